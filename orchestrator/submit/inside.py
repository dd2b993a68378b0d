"""What a cluster has, seen by a driver that is connected to it: the autoscaler's limits too, which HTTP does
not tell.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping

import ray
from ray._private.state import state

from ..cluster import ClusterFacts
from .facts import node_facts


def facts_inside() -> ClusterFacts:
    """The facts of the Ray that this process is connected to (`ray.init` was called)."""
    alive = (node for node in ray.nodes() if node["Alive"])
    nodes = tuple(node_facts(node["Resources"], node.get("Labels")) for node in alive)
    limits: Mapping[str, float] = state.get_max_resources_from_cluster_config() or {}
    return ClusterFacts(
        nodes=nodes,
        max_cpus=max(limits.get("CPU", 0), sum(node.cpus for node in nodes)),
        max_gpus=max(limits.get("GPU", 0), sum(node.gpus for node in nodes)),
        max_nodes=len(nodes) + bool(limits),
        ray_version=ray.__version__,
        python_version=platform.python_version(),
        source="the cluster's head",
    )
