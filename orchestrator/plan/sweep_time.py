"""About how long a sweep takes, from its start to its last trial's end. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..spec.job import JobSpec
from ..spec.sharing import base_key, changes_base
from ..spec.trials import evaluations
from . import Plan
from .layout import Layout
from .model_sizes import ModelSizes
from .row_lengths import RowFacts

START_S = 20.0
"""Seconds until a group of workers steps, a small base assumed."""
CORE_FLOPS = 3e10
"""Multiplications and additions in a second of one CPU core in float32, as training reaches them."""
GPU_FLOPS = 1e14
"""Of one GPU in bfloat16, likewise."""


def seconds_of(
    spec: JobSpec,
    plan: Plan,
    layout: Layout,
    trials: int,
    read: float | None,
    sizes: ModelSizes | None,
    rows: RowFacts,
    loads: int,
) -> float | None:
    """Twice two operations for each parameter and token (forward, and backward through a frozen base), over what the
    workers can do; rows are taken for half as long as the longest.

    Args:
        read: rows that a trial reads; None where that is not known.
    """
    if read is None or sizes is None:
        return None
    tokens = read * (rows.longest or plan.sequence_len) / 2
    one = CORE_FLOPS * plan.bundle.get("CPU", 1)
    speed = (GPU_FLOPS * plan.bundle["GPU"] if plan.use_gpu else one) * plan.num_workers
    share = _share(spec, spec.sweep.scheduler.type if spec.sweep else "none")
    return loads * START_S + trials * share * 4 * sizes.parameters * tokens / speed / layout.groups


def num_bases(jobs: Sequence[JobSpec], *, on_gpu: bool) -> int:
    """Bases that differ, of jobs that leave theirs as it is."""
    return len({base_key(job, on_gpu=on_gpu) for job in jobs if not changes_base(job)})


def loads_of(jobs: Sequence[JobSpec], trials: int, groups: int, *, on_gpu: bool = False) -> int:
    """Times that a group of workers begins with a base, one after the other."""
    kinds = num_bases(jobs, on_gpu=on_gpu)
    changing = sum(changes_base(job) is not None for job in jobs) / len(jobs)
    return math.ceil((kinds + round(trials * changing)) / groups)


def _share(spec: JobSpec, scheduler: str) -> float:
    """The share of all steps that are taken where a scheduler stops trials."""
    count = evaluations(spec) or 8
    if scheduler == "none" or spec.sweep is None:
        return 1.0
    if scheduler == "median":
        return (1 + spec.sweep.scheduler.grace_period / count) / 2
    factor, at, alive, done = spec.sweep.scheduler.reduction_factor, 0.0, 1.0, 0.0
    rung = float(spec.sweep.scheduler.grace_period)
    while rung < count:
        done, at, alive, rung = done + alive * (rung - at), rung, alive / factor, rung * factor
    return min(1.0, (done + alive * (count - at)) / count)
