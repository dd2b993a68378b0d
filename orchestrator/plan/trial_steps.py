"""How many steps a trial takes, and whether it is evaluated often enough for a sweep's scheduler. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import SpecError
from ..spec.job import JobSpec
from ..spec.rules import accumulation
from ..spec.sweep import SweepSpec
from .row_lengths import RowFacts


def steps_of(job: JobSpec, rows: RowFacts) -> int | None:
    """Optimizer steps of a trial that nobody stops; None where the number of its rows would tell."""
    training = job.training
    if rows.count is None:
        return training.max_steps
    steps = training.num_epochs * _epoch(job, rows.count)
    return min(steps, training.max_steps or steps)


def _epoch(job: JobSpec, rows: int) -> int:
    """Steps over so many rows, those held out included."""
    held_out = job.data.val_set_size
    count = rows - (held_out if isinstance(held_out, int) else round(rows * held_out))
    return math.ceil(max(1, count) / accumulation(job)[1])


def _evaluations(job: JobSpec, rows: RowFacts) -> int | None:
    """How often a trial that nobody stops is evaluated, as `train.schedule.evaluates_at` says and once at its end; None
    where its steps are not known."""
    training, steps = job.training, steps_of(job, rows)
    if steps is None or (training.eval_steps is None and rows.count is None):
        return None
    if training.eval_steps is not None:
        return math.ceil(steps / training.eval_steps)
    epoch = max(1, _epoch(job, rows.count or 0))
    times = min(training.evals_per_epoch or 1, epoch)
    due, before = steps * times // epoch, (steps - 1) * times // epoch
    return due + (due == before)


def check_evaluations(sweep: SweepSpec, jobs: Sequence[JobSpec], rows: RowFacts) -> None:
    """Raises SpecError where the rows are so few, or evaluated so seldom, that a scheduler never sees a trial before
    its end: known only here, by the number of rows."""
    counts = [_evaluations(job, rows) for job in jobs]
    known = [count for count in counts if count is not None]
    grace = sweep.scheduler.grace_period
    if len(known) < len(jobs) or max(known) > grace:
        return
    job = jobs[counts.index(max(known))]
    steps, count = steps_of(job, rows) or 1, max(known)
    often = "once, at its end" if count == 1 else f"{count} times, the last at its end"
    raise SpecError(
        f"{sweep.scheduler.type} has nothing to compare: it looks at trials from evaluation {grace} on, before their "
        f"end, and a trial of {steps} steps is evaluated {often}.",
        where="sweep.scheduler",
        hint=f"Write training.eval_steps: {max(1, steps // (4 * grace))}, or scheduler: none.",
    )
