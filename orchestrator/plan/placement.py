"""Whether a cluster can ever give a job its workers, and whether their memory fits: pure, from facts."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..cluster import ClusterFacts, NodeFacts
from ..errors import PlacementError
from ..spec.job import JobSpec

_GIB = 2**30

GPU_GIB = {
    "B200": 180,
    "H200": 141,
    "H100": 80,
    "A100-80G": 80,
    "A100-40G": 40,
    "A100": 40,
    "L40S": 48,
    "L40": 48,
    "A40": 48,
    "A6000": 48,
    "L4": 24,
    "A10G": 24,
    "A10": 24,
    "V100": 16,
    "T4": 16,
}
"""Memory by Ray's `accelerator-type`; the smallest of a name that comes in several sizes."""

Bundle = Mapping[str, float]


def check_placement(spec: JobSpec, bundle: Bundle, cluster: ClusterFacts) -> None:
    """Raises PlacementError where the workers can never be placed; a cluster that is merely busy passes."""
    wanted, most = spec.resources.min_workers, most_workers(spec, bundle, cluster)
    if wanted <= most:
        return
    labels = spec.resources.labels
    if labels and not any(has_labels(node.labels, labels) for node in cluster.nodes) and not _grows(cluster):
        text = ", ".join(f"{key}={value}" for key, value in labels.items())
        raise PlacementError(
            f"no node of {_name(cluster)} has the labels {text}.",
            where="resources.labels",
            hint="Remove the labels, or name another cluster.",
        )
    one = "worker" if wanted == 1 else "workers"
    raise PlacementError(
        f"{wanted} {one} of {describe(bundle)} can never be placed ({spec.resources.placement}):"
        f" {_name(cluster)} has {_has(bundle, cluster)}{' at most' if _grows(cluster) else ''},"
        f" room for {most}.",
        where="resources.num_workers",
        hint=_advice(spec, bundle, cluster, most),
    )


def _advice(spec: JobSpec, bundle: Bundle, cluster: ClusterFacts, most: int) -> str:
    if most:
        return f"Write resources.num_workers: {most}, or name a larger cluster."
    if bundle.get("GPU", 0) and not max([cluster.max_gpus, *(node.gpus for node in cluster.nodes)]):
        return "Write resources.gpus_per_worker: auto, or name a cluster with GPUs."
    return "Lower resources.cpus_per_worker or gpus_per_worker, or name a larger cluster."


def most_workers(spec: JobSpec, bundle: Bundle, cluster: ClusterFacts) -> int:
    """Workers that the cluster can ever hold, the autoscaler's maximum counted."""
    nodes = [node for node in cluster.nodes if has_labels(node.labels, spec.resources.labels)]
    room = [capacity({"CPU": node.cpus, "GPU": node.gpus}, bundle) for node in nodes]
    strategy = spec.resources.placement
    now = {
        "STRICT_PACK": max(room, default=0),
        "STRICT_SPREAD": sum(1 for each in room if each),
    }.get(strategy, sum(room))
    if not _grows(cluster):
        return now
    # The sizes of nodes to come are not known: the totals bound every strategy, the count of nodes STRICT_SPREAD.
    later = capacity({"CPU": cluster.max_cpus, "GPU": cluster.max_gpus}, bundle)
    if strategy == "STRICT_SPREAD":
        later = min(later, cluster.max_nodes)
    return max(now, later)


def _grows(cluster: ClusterFacts) -> bool:
    cpus, gpus = sum(node.cpus for node in cluster.nodes), sum(node.gpus for node in cluster.nodes)
    return cluster.max_cpus > cpus or cluster.max_gpus > gpus


def capacity(resources: Bundle, bundle: Bundle) -> int:
    """How many bundles fit into resources."""
    parts = [math.floor(resources.get(name, 0) / amount + 1e-9) for name, amount in bundle.items() if amount]
    return min(parts, default=0)


def has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a node with `labels` is one that is wanted; Ray's selectors `in(a, b)`, `!a`, `!in(a, b)` count too."""
    return all(_matches(labels.get(key), value) for key, value in wanted.items())


def _matches(value: str | None, wanted: str) -> bool:
    """Ray's label selectors: `value`, `!value`, `in(a, b)`, `!in(a, b)`."""
    if wanted.startswith("!"):
        return not _matches(value, wanted[1:])
    if wanted.startswith("in(") and wanted.endswith(")"):
        return value in [choice.strip() for choice in wanted[3:-1].split(",")]
    return value == wanted


def _name(cluster: ClusterFacts) -> str:
    return cluster.source or "the cluster"


def _has(bundle: Bundle, cluster: ClusterFacts) -> str:
    cpus = max(cluster.max_cpus, sum(node.cpus for node in cluster.nodes))
    gpus = max(cluster.max_gpus, sum(node.gpus for node in cluster.nodes))
    have = [f"{cpus:g} CPU"] + ([f"{gpus:g} GPU"] if "GPU" in bundle else [])
    count = len(cluster.nodes)
    return f"{' and '.join(have)} on {count} node{'' if count == 1 else 's'}"


def describe(bundle: Bundle) -> str:
    """`{CPU: 1, GPU: 1}`."""
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in bundle.items()) + "}"


def gpu_memory(node: NodeFacts) -> int:
    """Bytes of one GPU of a node; 0 where its type is not known."""
    kind = node.gpu_type or node.labels.get("ray.io/accelerator-type", "")
    for name, gib in GPU_GIB.items():
        if kind.upper().removeprefix("NVIDIA-").removeprefix("NVIDIA_TESLA_") == name:
            return gib * _GIB
    return 0


def memory_shortage(spec: JobSpec, bundle: Bundle, cluster: ClusterFacts, worker_bytes: int) -> str | None:
    """One sentence where a worker's memory exceeds its GPU's, or a node's workers exceed the node's; else None."""
    nodes = [node for node in cluster.nodes if has_labels(node.labels, spec.resources.labels)]
    if gpus := bundle.get("GPU", 0):
        most = max((gpu_memory(node) for node in nodes), default=0)
        if most and worker_bytes * max(1.0, 1 / gpus) > most * max(1.0, gpus):
            return f"A worker needs {show_bytes(worker_bytes)} of a GPU's {show_bytes(most)}."
        return None
    for node, workers in zip(nodes, _spread(spec, bundle, nodes), strict=True):
        if node.memory and workers * worker_bytes > node.memory:
            count = f"{workers} workers need" if workers > 1 else "A worker needs"
            return f"{count} {show_bytes(workers * worker_bytes)} of a node's {show_bytes(node.memory)}."
    return None


def _spread(spec: JobSpec, bundle: Bundle, nodes: list[NodeFacts]) -> list[int]:
    """Workers on each node: PACK fills one after the other, SPREAD gives in turn."""
    room = [capacity({"CPU": node.cpus, "GPU": node.gpus}, bundle) for node in nodes]
    placed, left = [0] * len(nodes), spec.resources.min_workers
    if spec.resources.placement.endswith("PACK"):
        for index in sorted(range(len(nodes)), key=lambda each: -room[each]):
            placed[index] = min(room[index], left)
            left -= placed[index]
        return placed
    while left > 0 and any(have < most for have, most in zip(placed, room, strict=True)):
        for index, most in enumerate(room):
            if left > 0 and placed[index] < most:
                placed[index] += 1
                left -= 1
    return placed


def show_bytes(size: float) -> str:
    """`36 KiB`, `512 MiB`, `1.5 GiB`."""
    if size < 2**20:
        return f"{size / 2**10:.0f} KiB"
    return f"{size / 2**20:.0f} MiB" if size < _GIB else f"{size / _GIB:.1f} GiB"
