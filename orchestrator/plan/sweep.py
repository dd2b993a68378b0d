"""A sweep's plan: how many trials, in how many groups of workers, and what that takes in memory and time. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..cluster import ClusterFacts
from ..deepspeed_config import deepspeed_config
from ..errors import PlacementError, SpecError
from ..spec.deepspeed_keys import zero_stage
from ..spec.job import JobSpec
from ..spec.rules import accumulation
from ..spec.sharing import base_key, changes_base, unshareable
from ..spec.space import combinations, dimensions
from ..spec.sweep import SweepSpec
from ..spec.trials import count_trials, evaluations, shown, trial_job
from ..spec.workers import forwards
from . import Plan, make_plan
from .memory import Memory
from .model_sizes import ModelSizes
from .placement import gpu_memory, has_labels, most_workers, show_bytes
from .row_lengths import RowFacts
from .view import plan_dict, plan_view

AT_ONCE = 8
"""Trials that train at once in a group of workers, where nobody says."""
WORTH_A_GROUP = 4
"""Trials at once from which another group, which loads the base once more, is worth its start."""
START_S = 20.0
"""Seconds until a group of workers steps, a small base assumed."""
CORE_FLOPS = 3e10
"""Multiplications and additions in a second of one CPU core in float32, as training reaches them."""
GPU_FLOPS = 1e14
"""Of one GPU in bfloat16, likewise."""
TRIED = 200
"""Trials of a space that are planned at most."""


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
    """Optimizer steps of a trial that nobody stops."""
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
    plans = [make_plan(job, cluster, sizes, rows) for job in jobs]
    worst = max(range(len(plans)), key=lambda at: _total(plans[at]))
    trial, job = plans[worst], jobs[worst]
    if any(plan.fits is False for plan in plans):
        at = next(at for at, plan in enumerate(plans) if plan.fits is False)
        said = [note for note in plans[at].notes if " of a " in note] or list(plans[at].notes)
        raise PlacementError(
            f"the trial with {shown(tried[at])} does not fit: {said[0]}", where="sweep.space"
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
    notes += _apart(jobs, reasons, sizes.mixes_rows if sizes else None)
    layout = lay_out(
        sweep, trials, room, trial.memory, worker_room(trial, job, cluster), is_alone=all(reasons)
    )
    memory = packed_memory(trial.memory, layout) if trial.memory else None
    if trial.alone is None and layout.concurrent < min(sweep.max_concurrent or 0, trials):
        number = f"{layout.concurrent} trial{'s' * (layout.concurrent > 1)}"
        notes.append(f"{number} at once, not {sweep.max_concurrent}: there is no more room.")
    steps = _steps(job, rows)
    if sweep.scheduler.type != "none":
        _check_evaluations(sweep, jobs, rows)
    return SweepPlan(
        sweep,
        trial,
        trials,
        layout,
        memory,
        trial.fits,
        steps,
        _seconds(spec, trial, layout, trials, steps, sizes, rows, _loads(jobs, trials, layout.groups)),
        (*notes, *trial.notes),
    )


def _apart(jobs: Sequence[JobSpec], reasons: Sequence[str | None], mixes: str | None) -> Iterator[str]:
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
    kinds = len({base_key(job) for job in jobs if not changes_base(job)})
    if kinds > 1:
        yield f"Trials stand on {kinds} different bases, each loaded once a group has no trials of another left."


def _with_a_number(plan: Plan, most: int | None) -> Plan:
    """An elastic job's plan with the most workers that the cluster can hold."""
    count = max(count for count in plan.counts if most is None or count <= most)
    notes = tuple(note for note in plan.notes if not note.startswith(("Elastic:", "Not used:")))
    return replace(plan.at(count), sizes=(), notes=notes)


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


def _steps(job: JobSpec, rows: RowFacts) -> int | None:
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
    training, steps = job.training, _steps(job, rows)
    if steps is None or (training.eval_steps is None and rows.count is None):
        return None
    if training.eval_steps is not None:
        return math.ceil(steps / training.eval_steps)
    epoch = max(1, _epoch(job, rows.count or 0))
    times = min(training.evals_per_epoch or 1, epoch)
    due, before = steps * times // epoch, (steps - 1) * times // epoch
    return due + (due == before)


def _check_evaluations(sweep: SweepSpec, jobs: Sequence[JobSpec], rows: RowFacts) -> None:
    """Raises SpecError where the rows are so few, or evaluated so seldom, that a scheduler never sees a trial before
    its end: known only here, by the number of rows."""
    counts = [_evaluations(job, rows) for job in jobs]
    known = [count for count in counts if count is not None]
    grace = sweep.scheduler.grace_period
    if len(known) < len(jobs) or max(known) > grace:
        return
    job = jobs[counts.index(max(known))]
    steps, count = _steps(job, rows) or 1, max(known)
    often = "once, at its end" if count == 1 else f"{count} times, the last at its end"
    raise SpecError(
        f"{sweep.scheduler.type} has nothing to compare: it looks at trials from evaluation {grace} on, before their "
        f"end, and a trial of {steps} steps is evaluated {often}.",
        where="sweep.scheduler",
        hint=f"Write training.eval_steps: {max(1, steps // (4 * grace))}, or scheduler: none.",
    )


def _seconds(
    spec: JobSpec,
    plan: Plan,
    layout: Layout,
    trials: int,
    steps: int | None,
    sizes: ModelSizes | None,
    rows: RowFacts,
    loads: int,
) -> float | None:
    """Twice two operations for each parameter and token (forward, and backward through a frozen base), over what the
    workers can do; rows are taken for half as long as the longest."""
    if steps is None or sizes is None:
        return None
    tokens = steps * plan.global_batch_size * (rows.longest or plan.sequence_len) / 2
    one = CORE_FLOPS * plan.bundle.get("CPU", 1)
    speed = (GPU_FLOPS * plan.bundle["GPU"] if plan.use_gpu else one) * plan.num_workers
    share = _share(spec, spec.sweep.scheduler.type if spec.sweep else "none")
    return loads * START_S + trials * share * 4 * sizes.parameters * tokens / speed / layout.groups


def _loads(jobs: Sequence[JobSpec], trials: int, groups: int) -> int:
    """Times that a group of workers begins with a base, one after the other."""
    kinds = {base_key(job) for job in jobs if not changes_base(job)}
    changing = sum(changes_base(job) is not None for job in jobs) / len(jobs)
    return math.ceil((len(kinds) + round(trials * changing)) / groups)


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


def sweep_view(plan: SweepPlan, name: str = "") -> RenderableType:
    """The plan as a rich table, then that of one trial."""
    table = Table(title=f"Sweep {name}", show_header=False, title_justify="left", box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    sweep, layout = plan.sweep, plan.layout
    rows: Sequence[tuple[str, str]] = (
        ("trials", f"{plan.trials}, {sweep.searcher} over {', '.join(_keys(sweep))}"),
        ("compares", f"{sweep.metric}, {'less' if sweep.direction == 'min' else 'more'} is better"),
        ("stops", _stops(sweep)),
        (
            "packs",
            f"{layout.groups} group{'s' * (layout.groups > 1)} of {plan.trial.num_workers} "
            f"worker{'s' * (plan.trial.num_workers > 1)}, {layout.pack} trial{'s' * (layout.pack > 1)} on each base, "
            f"{layout.concurrent} at once{_joined(layout)}",
        ),
        (
            "memory",
            f"{show_bytes(plan.memory.total)} a worker of a full pack" if plan.memory else "not known",
        ),
        ("steps", f"{plan.steps} a trial" if plan.steps is not None else "not known: the rows are elsewhere"),
        ("time", f"about {_clock(plan.seconds)}" if plan.seconds is not None else "not known"),
    )
    for key, text in rows:
        table.add_row(key, text)
    return Group(
        table, Text(""), plan_view(replace(plan.trial, notes=plan.notes), "the trial that needs most")
    )


def _joined(layout: Layout) -> str:
    if layout.joined is None or layout.pack == 1:
        return ""
    return (
        f", at most {layout.joined} of a base in one forward" if layout.joined > 1 else ", one forward each"
    )


def _keys(sweep: SweepSpec) -> list[str]:
    return [key for each in dimensions(sweep.space) for key in each.keys]


def _stops(sweep: SweepSpec) -> str:
    how = sweep.scheduler
    if how.type == "none":
        return "no trial before its end"
    every = f"from evaluation {how.grace_period} on"
    if how.type == "median":
        return f"what is worse than the median, {every}"
    return f"all but one of {how.reduction_factor:g} at each rung (asha), {every}"


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
