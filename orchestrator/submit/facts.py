"""What a cluster has: from its dashboard over HTTP, or from its launcher file or manifest without it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .. import local_ray
from ..cluster import Cluster, ClusterFacts, NodeFacts
from ..errors import ClusterError, first_line
from .dashboard import Dashboard

ACCELERATOR_LABEL = "ray.io/accelerator-type"
_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def read_facts(cluster: Cluster) -> ClusterFacts | None:
    """What `cluster` has and can grow to. None where its files do not say.

    Raises:
        ClusterError: an address that does not answer (within seconds), or refuses the token.
    """
    if cluster.kind == "local":
        return local_ray.facts()
    if cluster.kind == "launcher" and cluster.launcher:
        return facts_of_launcher(cluster.launcher)
    if cluster.kind == "kuberay" and cluster.manifest:
        return facts_of_manifest(cluster.manifest)
    return facts_at(Dashboard(cluster.address)) if cluster.address else None


def not_ray(dashboard: Dashboard) -> ClusterError:
    """What to say where something else answers."""
    return ClusterError(
        "something answers there, but it is not the dashboard of a Ray that we know.",
        where=dashboard.address,
        hint="Give the address that `ray start --head` printed, usually http://HOST:8265.",
    )


def facts_at(dashboard: Dashboard) -> ClusterFacts:
    """What a running cluster says over HTTP. Where an autoscaler can add nodes, its limits are not told this
    way: the maxima are then infinite, and the job's own driver, which can see them, checks again."""
    versions = (dashboard.get("/api/v0/cluster_metadata") or {}).get("data") or {}
    if "rayVersion" not in versions:
        raise not_ray(dashboard)
    nodes = _nodes(dashboard)
    grows = _can_grow(dashboard)
    return ClusterFacts(
        nodes=nodes,
        max_cpus=math.inf if grows else sum(node.cpus for node in nodes),
        max_gpus=math.inf if grows else sum(node.gpus for node in nodes),
        max_nodes=len(nodes) + grows,
        ray_version=versions["rayVersion"],
        python_version=versions.get("pythonVersion"),
        source=dashboard.address,
    )


def _nodes(dashboard: Dashboard) -> tuple[NodeFacts, ...]:
    """The nodes that are alive. A head whose dashboard answers before its node has joined is waited for."""
    for _ in range(150):
        listed = dashboard.get("/api/v0/nodes?detail=1&limit=10000")["data"]["result"]["result"]
        alive = (each for each in listed if each["state"] == "ALIVE")
        if nodes := tuple(node_facts(each["resources_total"], each.get("labels")) for each in alive):
            return nodes
        time.sleep(0.2)
    raise ClusterError(
        "the cluster has no node that is alive.",
        where=dashboard.address,
        hint="Look at its dashboard, and at raylet.out in the head's log folder.",
    )


def node_facts(resources: Mapping[str, float], labels: Mapping[str, str] | None) -> NodeFacts:
    """A node from its resources and labels as Ray names them."""
    labels = dict(labels or {})
    return NodeFacts(
        cpus=resources.get("CPU", 0),
        gpus=resources.get("GPU", 0),
        memory=int(resources.get("memory", 0)),
        labels=labels,
        gpu_type=labels.get(ACCELERATOR_LABEL),
    )


def _can_grow(dashboard: Dashboard) -> bool:
    """Whether an autoscaler that may launch nodes reports. The one of a plain `ray start --head` only looks,
    and gives each node a type of its own, named after its id."""
    status = (dashboard.get("/api/cluster_status") or {}).get("data") or {}
    report = (status.get("clusterStatus") or {}).get("autoscalerReport") or {}
    types = report.get("nodeTypeMapping") or {}
    return any(kind not in ("local.cluster.node", f"node_{node}") for node, kind in types.items())


def facts_of_launcher(path: str) -> ClusterFacts | None:
    """What Ray's launcher would start: each node type's `resources` times its `max_workers`. None where a
    type does not say its resources (Ray then asks the cloud, which we do not)."""
    config = load_yaml(path)
    provider = config.get("provider") or {}
    types = config.get("available_node_types") or {}
    if provider.get("type") == "local" or not types:
        return None  # machines of one's own: only they know what is in them
    head_type, limit = config.get("head_node_type"), config.get("max_workers", 2)
    nodes: list[NodeFacts] = []
    for name, each in types.items():
        resources = each.get("resources") or {}
        if "CPU" not in resources:
            return None
        count = min(each.get("max_workers", 0), limit) + (name == head_type)
        nodes += [node_facts(resources, each.get("labels"))] * count
    return _at_most(nodes, limit + 1, path)


def facts_of_manifest(path: str) -> ClusterFacts | None:
    """What a KubeRay manifest (RayJob, RayService or RayCluster) can grow to: `maxReplicas` of each worker
    group times its Ray container's limits."""
    spec = load_yaml(path).get("spec") or {}
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    if "headGroupSpec" not in cluster:
        return None
    nodes = [pod_facts(cluster["headGroupSpec"])]
    scales = cluster.get("enableInTreeAutoscaling", False)
    for group in cluster.get("workerGroupSpecs") or []:
        replicas = group.get("replicas", 0)
        nodes += [pod_facts(group)] * (group.get("maxReplicas", replicas) if scales else replicas)
    facts = _at_most(nodes, len(nodes), path)
    version = cluster.get("rayVersion")
    return ClusterFacts(
        nodes=facts.nodes,
        max_cpus=facts.max_cpus,
        max_gpus=facts.max_gpus,
        max_nodes=facts.max_nodes,
        ray_version=version,
        source=path,
    )


def pod_facts(group: dict[str, Any]) -> NodeFacts:
    """One node of a group. `rayStartParams` wins over the container's limits, as in KubeRay."""
    resources = group["template"]["spec"]["containers"][0].get("resources") or {}
    asked = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    params = group.get("rayStartParams") or {}
    gpus = sum(quantity(value) for key, value in asked.items() if key.endswith("/gpu"))
    written = (part.split("=", 1) for part in str(params.get("labels", "")).split(",") if "=" in part)
    labels = {**(group.get("labels") or {}), **{name.strip(): value.strip() for name, value in written}}
    return NodeFacts(
        cpus=float(params["num-cpus"]) if "num-cpus" in params else quantity(asked.get("cpu", 0)),
        gpus=float(params["num-gpus"]) if "num-gpus" in params else gpus,
        memory=int(quantity(asked.get("memory", 0))),
        labels=labels,
        gpu_type=labels.get(ACCELERATOR_LABEL),
    )


def quantity(text: object) -> float:
    """A Kubernetes quantity as a number: `500m`, `4`, `16Gi`."""
    match = re.fullmatch(r"([0-9.]+)(m|[kMGT]i?|)", str(text).strip())
    if match is None:
        return 0.0
    number, unit = float(match[1]), match[2]
    return number / 1000 if unit == "m" else number * _UNITS.get(unit, 1)


def _at_most(nodes: list[NodeFacts], limit: int, source: str) -> ClusterFacts:
    """Facts of `nodes`, of which at most `limit` exist at once: those with the most GPUs, then CPUs."""
    chosen = sorted(nodes, key=lambda node: (node.gpus, node.cpus), reverse=True)[:limit]
    return ClusterFacts(
        nodes=tuple(chosen),
        max_cpus=sum(node.cpus for node in chosen),
        max_gpus=sum(node.gpus for node in chosen),
        max_nodes=len(chosen),
        source=path_name(source),
    )


def path_name(path: str) -> str:
    """`path` from the working directory where it lies below it: what a user recognises."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def load_yaml(path: str) -> dict[str, Any]:
    """A YAML file of somebody else's (the launcher's, Kubernetes') as plain values."""
    try:
        loaded = YAML(typ="safe", pure=True).load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ClusterError(
            f"the file cannot be read: {first_line(error)}", where=path, hint="Mend it, then: raypeft plan"
        ) from error
    return loaded if isinstance(loaded, dict) else {}
