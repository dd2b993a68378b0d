"""What a cluster has, seen by a driver that is connected to it: the autoscaler's limits too, which HTTP does
not tell.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import ray
from ray._private.state import state

from ..cluster import ClusterFacts, NodeFacts
from .facts import ACCELERATOR_LABEL


def facts_inside() -> ClusterFacts:
    """The facts of the Ray that this process is connected to (`ray.init` was called)."""
    nodes = tuple(_node(node) for node in ray.nodes() if node["Alive"])
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


def _node(listed: dict[str, Any]) -> NodeFacts:
    resources, labels = listed["Resources"], listed.get("Labels") or {}
    return NodeFacts(
        cpus=resources.get("CPU", 0),
        gpus=resources.get("GPU", 0),
        memory=int(resources.get("memory", 0)),
        labels=labels,
        gpu_type=labels.get(ACCELERATOR_LABEL),
    )
