"""The nodes of a Ray cluster as a driver sees them: what they have, which are going, which do not answer."""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import ray
from ray._private.state import state
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from orchestrator.plan import Plan

from .placement import NodeRoom

NODE_LABEL = "ray.io/node-id"
"""The label by which Ray itself names each node."""

PROBE_S = 1.0
"""How long a node's raylet is given to take a connection. One whose process was killed refuses at once; Ray's own
health checks need some fifteen seconds to say so."""


class Reservation:
    """A placement group that holds room for workers, or waits for it; an autoscaler sees it as demand."""

    def __init__(self, group: PlacementGroup) -> None:
        self._group = group

    def wait(self, timeout_s: float) -> bool:
        """Whether the room is there, now or within the time."""
        return self._group.wait(timeout_s)

    def release(self) -> None:
        """Lets go of the room, or of the wish for it."""
        remove_placement_group(self._group)


class RayCluster:
    """The cluster of the Ray session that this process has joined."""

    def rooms(self) -> list[NodeRoom]:
        """The live nodes that are not about to go, with what each has and what is free."""
        free, going = ray._private.state.available_resources_per_node(), self.going()
        return [
            NodeRoom(node["Resources"], free.get(node["NodeID"], {}), node.get("Labels", {}), node["NodeID"])
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] not in going
        ]

    def grows_to(self) -> Mapping[str, float]:
        """What the autoscaler could give in all, by resource; empty where the cluster does not grow."""
        return state.get_max_resources_from_cluster_config() or {}

    def kinds(self) -> list[Mapping[str, float]]:
        """What a node has of each kind that the autoscaler can start."""
        config = state.get_cluster_config()
        return (
            [dict(group.resources) for group in config.node_group_configs if group.max_count]
            if config
            else []
        )

    def going(self) -> set[str]:
        """The ids of nodes that have been told to go: drained, or announced by the cloud."""
        return set(state.get_draining_nodes())

    def silent(self, node_ids: Iterable[str]) -> dict[str, str]:
        """Those of the nodes that are dead or do not answer: id -> how a user knows it."""
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        return {
            node_id: _name(nodes.get(node_id), node_id)
            for node_id in set(node_ids)
            if not _answers(nodes.get(node_id))
        }

    def reserve(self, plan: Plan, num_workers: int, without: Collection[str] = ()) -> Reservation:
        """Asks for room for so many of the plan's workers, away from the nodes in `without`."""
        labels = labels_without(plan, without)
        return Reservation(
            placement_group(
                [dict(plan.bundle)] * num_workers,
                strategy=plan.placement,
                bundle_label_selector=[labels] * num_workers if labels else None,
            )
        )


def labels_without(plan: Plan, nodes: Collection[str]) -> dict[str, str]:
    """The plan's labels, with one more that keeps its workers off these nodes."""
    if not nodes:
        return dict(plan.labels)
    return {**plan.labels, NODE_LABEL: f"!in({', '.join(sorted(nodes))})"}


def away_from(plan: Plan, nodes: Collection[str]) -> Plan:
    """The plan, its workers kept off these nodes."""
    return replace(plan, labels=labels_without(plan, nodes))


def _answers(node: Mapping[str, Any] | None) -> bool:
    if node is None or not node["Alive"]:
        return False
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), PROBE_S):
            return True
    except OSError:
        return False


def _name(node: Mapping[str, Any] | None, node_id: str) -> str:
    return f"{node['NodeManagerAddress']} ({node_id[:8]})" if node else node_id[:8]
