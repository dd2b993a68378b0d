"""Where a sweep's trials train: in how many groups of workers at once, and how many on the base of each. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..cluster import ClusterFacts
from ..spec.job import JobSpec
from ..spec.sweep import SweepSpec
from . import Plan
from .memory import Memory
from .placement import gpu_memory, has_labels

AT_ONCE = 8
"""Trials that train at once in a group of workers, where nobody says."""
WORTH_A_GROUP = 4
"""Trials at once from which another group, which loads the base once more, is worth its start."""


@dataclass(frozen=True)
class Layout:
    """Where trials train."""

    groups: int
    """Groups of workers at once, each with one base."""
    pack: int
    """Trials on each base."""
    concurrent: int
    """Trials in all that train at once."""
    joined: int | None = None
    """Trials of a pack in one forward, as far as a worker has memory for them; None where that is not known."""


def lay_out(
    sweep: SweepSpec,
    trials: int,
    room: int,
    memory: Memory | None = None,
    worker: float | None = None,
    *,
    is_alone: bool = False,
) -> Layout:
    """Where so many trials train.

    Args:
        room: groups of workers that the cluster can hold at once.
        memory: of a trial alone, the one that needs most; None where that is not known.
        worker: bytes that a worker may use; None where that is not known.
        is_alone: whether no two trials may share a base.
    """
    room, most = max(1, room), 10**9
    if memory is not None and worker is not None:
        resting = memory.adapter + memory.optimizer
        most = max(1, int((worker - (memory.total - resting)) // max(1, resting)))
    asked = 1 if is_alone else sweep.pack
    if asked != "auto":
        pack = min(asked, trials)
        wanted = min(trials, sweep.max_concurrent or pack * room, pack * room)
        groups = min(room, math.ceil(wanted / pack))
        layout = Layout(groups, min(pack, wanted), wanted)
    else:
        wanted = min(trials, sweep.max_concurrent or AT_ONCE * room, most * room)
        groups = min(room, max(1, wanted // WORTH_A_GROUP, math.ceil(wanted / most)))
        layout = Layout(groups, math.ceil(wanted / groups), wanted)
    if memory is None or worker is None:
        return layout
    moving = memory.gradients + memory.activations
    left = worker - (packed_memory(memory, layout).total - moving)
    return replace(layout, joined=min(layout.pack, max(1, int(left // max(1, moving)))))


def packed_memory(memory: Memory, layout: Layout) -> Memory:
    """One base, what each trial of a pack keeps from step to step, and what one forward and backward of as many as run
    joined takes; by turns, of one of them."""
    joined = layout.joined or 1
    return replace(
        memory,
        adapter=memory.adapter * layout.pack,
        optimizer=memory.optimizer * layout.pack,
        gradients=memory.gradients * joined,
        activations=memory.activations * joined,
    )


def worker_room(plan: Plan, job: JobSpec, cluster: ClusterFacts | None) -> float | None:
    """Bytes that a worker of this plan may use, a tenth left free; None where that is not known."""
    if cluster is None:
        return None
    nodes = [node for node in cluster.nodes if has_labels(node.labels, job.resources.labels)]
    if plan.use_gpu:
        rooms = [gpu_memory(node) for node in nodes if gpu_memory(node)]
    else:
        rooms = [int(node.memory // max(1, node.cpus // plan.bundle["CPU"])) for node in nodes if node.memory]
    return 0.9 * min(rooms) if rooms else None
