"""A job as a KubeRay RayJob: the cluster file's manifest with the job filled in. Pure: nothing is sent.

The code is in the image (`clusters/Dockerfile`); spec and cluster file travel in the runtime environment;
secrets come from a Kubernetes Secret, by reference.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import LiteralScalarString

from ..cluster import Cluster
from ..errors import ClusterError, PlacementError
from ..spec.canonical import resolved_yaml
from ..spec.job import JobSpec
from .facts import load_yaml, path_name, pod_facts
from .inline import CLUSTER_VARIABLE, SPEC_VARIABLE
from .jobs import RUN_KEY, STOP_S, pinned, run_id
from .payload import cluster_inside, pack

IMAGE_FOLDER = "/home/ray/raypeft"
"""Where `clusters/Dockerfile` puts the checkout: relative paths of a job start there."""
SECRET = "raypeft-credentials"
"""The Kubernetes Secret that the manifests under `clusters/kuberay` read."""
NAME_LENGTH = 40
"""KubeRay adds to the name, and the names of its services and pods have at most 63 characters."""


def rayjob(spec: JobSpec, cluster: Cluster, *, arguments: Sequence[str] = ()) -> str:
    """The complete manifest, as YAML.

    Raises:
        ClusterError: the cluster file's manifest is not a RayJob.
        PlacementError: no worker group can hold a worker, or not as many as asked for.
        DataError, ModelError: the job's data or base do not exist.
    """
    manifest = _template(cluster)
    payload = pack(pinned(spec), cluster)
    # Paths stay as they are written: they are read inside the image, or on a volume of the user's.
    values = payload.spec.model_copy(
        update={"model": pinned(spec).model, "data": spec.data, "eval": spec.eval}
    )
    run = run_id(spec)
    body = manifest["spec"]
    manifest["metadata"] = {**(manifest.get("metadata") or {}), "name": kubernetes_name(run)}
    command = ["python", "-m", "orchestrator.submit.inline", "--json", *arguments]
    body["entrypoint"] = " ".join(command)
    relative = [
        local.written for local in payload.local if not Path(local.written).expanduser().is_absolute()
    ]
    body["runtimeEnvYAML"] = LiteralScalarString(_runtime_env(values, cluster, bool(relative)))
    body["metadata"] = {**(body.get("metadata") or {}), RUN_KEY: run}
    ray_cluster = body["rayClusterSpec"]
    _fill_groups(spec, ray_cluster, where=path_name(cluster.manifest or ""))
    _refer_to_secrets(spec.secrets, ray_cluster["headGroupSpec"])
    return _comments(spec, [local.written for local in payload.local]) + _dump(manifest)


def kubernetes_name(run: str) -> str:
    """`run` as a name that Kubernetes takes; its hash stays whole."""
    name, _, digest = run.rpartition("-")
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[: NAME_LENGTH - len(digest) - 1].strip("-")
    return f"{readable or 'job'}-{digest}"


def _template(cluster: Cluster) -> dict[str, Any]:
    if cluster.manifest is None:
        raise ClusterError(
            f"cluster '{cluster.name}' has no manifest.",
            where=cluster.path,
            hint="Write kind: kuberay and manifest: rayjob.yaml",
        )
    manifest = load_yaml(cluster.manifest)
    if manifest.get("kind") != "RayJob" or "rayClusterSpec" not in (manifest.get("spec") or {}):
        raise ClusterError(
            f"a {manifest.get('kind') or 'file without a kind'} is not a RayJob with a rayClusterSpec.",
            where=path_name(cluster.manifest),
            hint="Start from clusters/kuberay/rayjob.yaml, or submit to a RayCluster that is up: --address.",
        )
    return manifest


def _runtime_env(spec: JobSpec, cluster: Cluster, in_image: bool) -> str:
    variables = {
        SPEC_VARIABLE: LiteralScalarString(resolved_yaml(spec)),
        CLUSTER_VARIABLE: LiteralScalarString(cluster_inside(cluster)),
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),
    }
    folder = {"working_dir": f"local://{IMAGE_FOLDER}"} if in_image else {}
    return _dump({**folder, "env_vars": variables})


def _fill_groups(spec: JobSpec, ray_cluster: dict[str, Any], where: str) -> None:
    """Sets the replicas of the first worker group that can hold the workers, or most of an elastic job's; all others
    start empty."""
    groups = ray_cluster.get("workerGroupSpecs") or []
    asked = spec.resources
    gpus = asked.gpus_per_worker
    if gpus == "auto":
        gpus = 1 if any(pod_facts(group).gpus for group in groups) else 0
    fitting = [group for group in groups if _per_pod(group, asked.cpus_per_worker, gpus, asked.labels)]
    if not fitting:
        raise PlacementError(
            f"no worker group has room for one worker ({asked.cpus_per_worker:g} CPUs, {gpus:g} GPUs"
            f"{', labels ' + str(asked.labels) if asked.labels else ''}).",
            where=where,
            hint="Change resources in the job, or add a group to the manifest.",
        )
    per_pod = [_per_pod(group, asked.cpus_per_worker, gpus, asked.labels) for group in fitting]
    most = [count * group["maxReplicas"] for count, group in zip(per_pod, fitting, strict=True)]
    chosen = max(
        range(len(fitting)), key=lambda each: min(most[each], asked.max_workers)
    )  # the first of equals
    if most[chosen] >= asked.min_workers:
        needed = min(math.ceil(asked.max_workers / per_pod[chosen]), fitting[chosen]["maxReplicas"])
        for group in groups:
            group["replicas"] = max(group.get("minReplicas", 0), needed if group is fitting[chosen] else 0)
        return
    raise PlacementError(
        f"{asked.min_workers} workers are more than a worker group can ever give ({max(most)}).",
        where=where,
        hint="Ask for fewer in resources.num_workers, or raise maxReplicas.",
    )


def _per_pod(group: dict[str, Any], cpus: float, gpus: float, labels: dict[str, str]) -> int:
    """How many workers one pod of the group holds."""
    pod = pod_facts(group)
    if any(pod.labels.get(name) != value for name, value in labels.items()):
        return 0
    room = int(pod.cpus // cpus)
    return min(room, int(pod.gpus // gpus)) if gpus else room


def _refer_to_secrets(names: Iterable[str], head: dict[str, Any]) -> None:
    """Has the driver's container take each secret from the Kubernetes Secret."""
    container = head["template"]["spec"]["containers"][0]
    known = {entry["name"] for entry in container.get("env") or []}
    for name in names:
        if name not in known:
            reference = {"secretKeyRef": {"name": SECRET, "key": name}}
            container.setdefault("env", []).append({"name": name, "valueFrom": reference})


def _comments(spec: JobSpec, local: list[str]) -> str:
    lines = [f"# {spec.name}: kubectl apply -f this"]
    if local:
        lines.append(f"# Read inside the image, relative paths below {IMAGE_FOLDER}: {', '.join(local)}")
    if spec.secrets:
        lines.append(f"# kubectl create secret generic {SECRET} needs the keys: {', '.join(spec.secrets)}")
    if spec.deploy is not None:
        lines.append(
            "# This cluster ends with the job. What it deploys is served by a RayService that stays:"
        )
        lines.append("# clusters/kuberay/rayservice.yaml reads the same registry.")
    return "\n".join(lines) + "\n"


def _dump(values: dict[str, Any]) -> str:
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 110
    yaml.representer.ignore_aliases = lambda data: True
    text = io.StringIO()
    yaml.dump(values, text)
    return text.getvalue()
