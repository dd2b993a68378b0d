"""Whether a cluster can ever give a plan its workers, and what it lacks now. Pure; `nodes.py` asks Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.plan import Plan
from orchestrator.plan.placement import capacity, describe, has_labels


@dataclass(frozen=True)
class NodeRoom:
    """One node: all that it has, of which `free` is not taken now, and its labels."""

    total: Mapping[str, float]
    free: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    node_id: str = ""


def places_in_all(plan: Plan, nodes: Sequence[NodeRoom]) -> int:
    """How many of the plan's workers the nodes could hold were they empty."""
    return _places(plan, [node.total for node in nodes if has_labels(node.labels, plan.labels)])


def places_now(plan: Plan, nodes: Sequence[NodeRoom], own: Mapping[str, int] | None = None) -> int:
    """For how many of the plan's workers there is room now.

    Args:
        own: this run's own workers by the id of their node; their room counts as free.
    """
    own = own or {}
    return _places(
        plan,
        [
            {
                name: node.free.get(name, 0) + own.get(node.node_id, 0) * amount
                for name, amount in plan.bundle.items()
            }
            for node in nodes
            if has_labels(node.labels, plan.labels)
        ],
    )


def _places(plan: Plan, rooms: Sequence[Mapping[str, float]]) -> int:
    counts = [capacity(room, plan.bundle) for room in rooms]
    return {
        "STRICT_PACK": max(counts, default=0),
        "STRICT_SPREAD": sum(1 for count in counts if count > 0),
    }.get(plan.placement, sum(counts))


def why_impossible(
    plan: Plan,
    nodes: Sequence[NodeRoom],
    most: Mapping[str, float] | None = None,
    kinds: Sequence[Mapping[str, float]] = (),
) -> str | None:
    """One sentence on why the workers can never be placed; None where they can, busy or not. An elastic run needs its
    least number.

    Args:
        nodes: the nodes that are up.
        most: what the autoscaler could give in all, by resource; None where the cluster does not grow.
        kinds: what a node has of each kind that the autoscaler can start.
    """
    least = plan.counts[0]
    wanted = f"{least} x {describe(plan.bundle)}"
    if most:
        for resource, amount in plan.bundle.items():
            available = max(most.get(resource, 0), sum(node.total.get(resource, 0) for node in nodes))
            if amount * least > available:
                return (
                    f"{wanted} needs {amount * least:g} {resource}, "
                    f"the cluster grows to {available:g} at most."
                )
        return _too_large(plan, [*(node.total for node in nodes), *kinds]) if kinds else None
    fitting = [node for node in nodes if has_labels(node.labels, plan.labels)]
    if plan.labels and not fitting:
        labels = ", ".join(f"{key}={value}" for key, value in plan.labels.items())
        return f"no node has the labels {labels}; the cluster has {len(nodes)} node(s)."
    places = places_in_all(plan, fitting)
    if places >= least:
        return None
    totals = {resource: sum(node.total.get(resource, 0) for node in fitting) for resource in plan.bundle}
    return (
        f"{wanted} placed {plan.placement} will never fit: the cluster has {describe(totals)} on "
        f"{len(fitting)} node(s), room for {places} worker(s)."
    )


def _too_large(plan: Plan, sizes: Sequence[Mapping[str, float]]) -> str | None:
    """Why no node of these sizes can have a worker, or all of them where one node must."""
    together = plan.counts[0] if plan.placement == "STRICT_PACK" else 1
    on_one = max((capacity(size, plan.bundle) for size in sizes), default=0)
    if on_one >= together:
        return None
    largest = {name: max(size.get(name, 0) for size in sizes) for name in plan.bundle}
    what = (
        f"{together} x {describe(plan.bundle)} on one node"
        if together > 1
        else f"a worker of {describe(plan.bundle)}"
    )
    return f"{what} will never fit: no node that is up, or can be started, has more than {describe(largest)}."


def what_is_missing(plan: Plan, nodes: Sequence[NodeRoom]) -> str:
    """What the workers wait for: `2 x {CPU: 1}; free now: CPU 1 of 2`."""
    fitting = [node for node in nodes if has_labels(node.labels, plan.labels)]
    free = ", ".join(
        f"{resource} {sum(node.free.get(resource, 0) for node in fitting):g} of "
        f"{sum(node.total.get(resource, 0) for node in fitting):g}"
        for resource in plan.bundle
    )
    return f"{plan.num_workers} x {describe(plan.bundle)}; free now: {free}"
