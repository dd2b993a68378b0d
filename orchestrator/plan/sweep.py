"""A sweep's plan: how many trials, in how many groups of workers, and what that takes in memory and time. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..cluster import ClusterFacts
from ..deepspeed_config import deepspeed_config
from ..errors import PlacementError, RaypeftError
from ..spec.deepspeed_keys import zero_stage
from ..spec.durations import format_duration
from ..spec.job import JobSpec
from ..spec.rules import accumulation
from ..spec.sharing import changes_base, unshareable
from ..spec.space import Parameters, combinations, dimensions
from ..spec.sweep import BudgetSpec, SweepSpec
from ..spec.trials import count_trials, shown, trial_job
from ..spec.workers import forwards
from . import Plan, make_plan
from .layout import Layout, lay_out, packed_memory, worker_room
from .memory import Memory
from .model_sizes import ModelSizes
from .placement import most_workers
from .row_lengths import RowFacts
from .sweep_time import loads_of, num_bases, seconds_of
from .trial_steps import check_evaluations, steps_of
from .view import plan_dict

TRIED = 200
"""Trials of a space that are planned at most."""


@dataclass(frozen=True)
class SweepPlan:
    """How a sweep will run."""

    sweep: SweepSpec
    trial: Plan
    """Of the trial that needs most."""
    trials: int
    layout: Layout
    memory: Memory | None
    """Of a worker of a full pack: one base, and as many adapters with their states as a pack has trials."""
    fits: bool | None
    steps: int | None
    """Optimizer steps of a trial that nobody stops, the longest of them."""
    seconds: float | None
    """From the start to the last trial's end, estimated; None where rows or base are not known."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As `raypeft plan --json` prints it; memory in bytes."""
        return {
            "sweep": self.sweep.model_dump(mode="json"),
            "trials": self.trials,
            **asdict(self.layout),
            "memory": {**asdict(self.memory), "total": self.memory.total} if self.memory else None,
            "fits": self.fits,
            "steps": self.steps,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "trial": plan_dict(self.trial),
        }


def make_sweep_plan(
    spec: JobSpec, cluster: ClusterFacts | None, sizes: ModelSizes | None, rows: RowFacts = RowFacts()
) -> SweepPlan:
    """The plan of a job with a sweep.

    Raises:
        SpecError, PlacementError: of the first trial that the plan of a job refuses; a trial that does not fit, with
            its parameters; a scheduler that never sees a trial before its end.
    """
    assert spec.sweep is not None
    sweep, notes = spec.sweep, list[str]()
    tried = list(itertools.islice(combinations(dimensions(sweep.space)), TRIED))
    jobs = [trial_job(spec, parameters) for parameters in tried]
    plans = [
        _planned(job, parameters, cluster, sizes, rows) for job, parameters in zip(jobs, tried, strict=True)
    ]
    worst = max(range(len(plans)), key=lambda at: _total(plans[at]))
    trial, job = plans[worst], jobs[worst]
    if any(plan.fits is False for plan in plans):
        at = next(at for at, plan in enumerate(plans) if plan.fits is False)
        said = [note for note in plans[at].notes if " of a " in note] or list(plans[at].notes)
        raise PlacementError(
            f"the trial with {shown(tried[at])} does not fit: {said[0]}",
            where="sweep.space",
            hint="Or leave it out of the space.",
        )
    most = most_workers(job, trial.bundle, cluster) if cluster else None
    if trial.sizes:
        trial = _with_a_number(trial, most)
        notes.append(
            f"Elastic jobs alone change their workers: each group of this sweep has {trial.num_workers}."
        )
    room = 1 if most is None else most // trial.num_workers
    trials = count_trials(sweep)
    reasons = [plan.alone for plan in plans]
    trial = replace(trial, alone=reasons[0] if all(reasons) else None)
    notes += _apart(jobs, reasons, sizes.mixes_rows if sizes else None, on_gpu=trial.use_gpu)
    layout = lay_out(
        sweep, trials, room, trial.memory, worker_room(trial, job, cluster), is_alone=all(reasons)
    )
    memory = packed_memory(trial.memory, layout) if trial.memory else None
    if trial.alone is None and layout.concurrent < min(sweep.max_concurrent or 0, trials):
        number = f"{layout.concurrent} trial{'s' * (layout.concurrent > 1)}"
        notes.append(f"{number} at once, not {sweep.max_concurrent}: there is no more room.")
    steps = [steps_of(job, rows) for job in jobs]
    if len(set(steps)) > 1 and None not in steps:
        notes.append(f"Trials take {min(filter(None, steps))} to {max(filter(None, steps))} steps.")
    if sweep.scheduler.type != "none":
        check_evaluations(sweep, jobs, rows)
    loads = loads_of(jobs, trials, layout.groups, on_gpu=trial.use_gpu)
    seconds = seconds_of(spec, trial, layout, trials, _read(steps, plans), sizes, rows, loads)
    if seconds is not None:
        notes += _over_budget(sweep.budget, seconds, layout.groups * trial.num_workers)
    return SweepPlan(
        sweep,
        trial,
        trials,
        layout,
        memory,
        trial.fits,
        None if None in steps else max(filter(None, steps)),
        seconds,
        (*notes, *trial.notes),
    )


def _over_budget(budget: BudgetSpec, seconds: float, workers: int) -> Iterator[str]:
    """Which budgets are used up before all trials have ended, as far as the estimate tells."""
    hours = seconds * workers / 3600
    if budget.time is not None and seconds > budget.time:
        yield (
            f"sweep.budget.time ({format_duration(budget.time)}) is likely to be over before all trials have ended; "
            "the best until then is taken."
        )
    if budget.worker_hours is not None and hours > budget.worker_hours:
        yield (
            f"sweep.budget.worker_hours ({budget.worker_hours:g}) are likely to be used up before all trials have "
            f"ended ({hours:.2g}); the best until then is taken."
        )


def _planned(
    job: JobSpec,
    parameters: Parameters,
    cluster: ClusterFacts | None,
    sizes: ModelSizes | None,
    rows: RowFacts,
) -> Plan:
    """Raises what `make_plan` raises; where a key that is drawn is the reason, with the trial."""
    try:
        return make_plan(job, cluster, sizes, rows)
    except RaypeftError as error:
        key = error.where or ""
        if any(f"{key}.".startswith(f"{each}.") for each in parameters):
            problem = f"the trial with {shown(parameters)}: {error.problem}"
            raise type(error)(problem, where=f"sweep.space.{key}", hint=error.hint) from error
        raise


def _apart(
    jobs: Sequence[JobSpec], reasons: Sequence[str | None], mixes: str | None, *, on_gpu: bool
) -> Iterator[str]:
    """Which trials do not share a base, and why, in sentences."""
    told = list(dict.fromkeys(reason for reason in reasons if reason))
    if mixes:
        told = [mixes]
    if all(reasons):
        yield f"Not packed: {'; '.join(told)}. Trials train one after the other in each group."
    elif told:
        yield f"Trials of some parameters are not packed: {'; '.join(told)}."
    if any(changes_base(job) for job in jobs):
        yield "A trial that changes the base loads one of its own."
    if (kinds := num_bases(jobs, on_gpu=on_gpu)) > 1:
        yield f"Trials stand on {kinds} different bases, each loaded once a group has no trials of another left."


def _with_a_number(plan: Plan, most: int | None) -> Plan:
    """An elastic job's plan with the most workers that the cluster can hold."""
    count = max(count for count in plan.counts if most is None or count <= most)
    notes = tuple(note for note in plan.notes if not note.startswith(("Elastic:", "Not used:")))
    return replace(plan.at(count), sizes=(), notes=notes)


def _read(steps: Sequence[int | None], plans: Sequence[Plan]) -> float | None:
    """Rows that a trial reads, on average over those that were planned; None where that is not known."""
    known = [count * plan.global_batch_size for count, plan in zip(steps, plans, strict=True) if count]
    return sum(known) / len(known) if len(known) == len(steps) else None


def _total(plan: Plan) -> int:
    return plan.memory.total if plan.memory else 0


def trial_plan(plan: Plan, job: JobSpec) -> Plan:
    """A trial's plan on the workers of its sweep: their number, what they have, its own batches and ZeRO stage."""
    _, size = accumulation(job)
    micro = job.training.micro_batch_size
    steps = forwards(size, micro, plan.num_workers)
    batch = {
        "train_batch_size": plan.num_workers * micro * steps,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    config, stage = deepspeed_config(job), zero_stage(job.deepspeed)
    if stage == plan.zero_stage == 3:  # which follows from the base
        key = "stage3_prefetch_bucket_size"
        config["zero_optimization"][key] = plan.deepspeed["zero_optimization"][key]
    return replace(
        plan,
        zero_stage=stage,
        micro_batch_size=micro,
        gradient_accumulation_steps=steps,
        global_batch_size=size,
        deepspeed={key: batch.get(key, value) for key, value in config.items()},
        sizes=(),
        serving=None,
        alone=unshareable(job) or plan.alone,
    )
