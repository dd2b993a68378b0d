"""A sweep's plan: how many trials, in how many groups of workers, and what that takes in memory and time. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..cluster import ClusterFacts
from ..errors import PlacementError
from ..spec.job import JobSpec
from ..spec.rules import accumulation
from ..spec.space import combinations, dimensions
from ..spec.sweep import SweepSpec
from ..spec.trials import count_trials, evaluations, trial_job
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
    sweep: SweepSpec, trials: int, room: int, memory: Memory | None = None, worker: float | None = None
) -> Layout:
    """Where so many trials train.

    Args:
        room: groups of workers that the cluster can hold at once.
        memory: of a trial alone, the one that needs most; None where that is not known.
        worker: bytes that a worker may use; None where that is not known.
    """
    room, most = max(1, room), 10**9
    if memory is not None and worker is not None:
        resting = memory.adapter + memory.optimizer
        most = max(1, int((worker - (memory.total - resting)) // max(1, resting)))
    if sweep.pack != "auto":
        pack = min(sweep.pack, trials)
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
        SpecError, PlacementError: of the first trial that the plan of a job refuses, with its parameters; a trial that
            does not fit.
    """
    assert spec.sweep is not None
    sweep, notes = spec.sweep, list[str]()
    jobs = _jobs(spec)
    plans = [make_plan(job, cluster, sizes, rows) for job in jobs]
    worst = max(range(len(plans)), key=lambda at: _total(plans[at]))
    trial, job = plans[worst], jobs[worst]
    if any(plan.fits is False for plan in plans):
        at = next(at for at, plan in enumerate(plans) if plan.fits is False)
        said = [note for note in plans[at].notes if " of a " in note] or list(plans[at].notes)
        raise PlacementError(f"a trial does not fit: {said[0]}", where="sweep.space")
    room = most_workers(job, trial.bundle, cluster) // trial.num_workers if cluster else 1
    trials = count_trials(sweep)
    layout = lay_out(sweep, trials, room, trial.memory, worker_room(trial, job, cluster))
    memory = packed_memory(trial.memory, layout) if trial.memory else None
    if sweep.max_concurrent and layout.concurrent < min(sweep.max_concurrent, trials):
        notes.append(
            f"{layout.concurrent} trials at once, not {sweep.max_concurrent}: there is no more room."
        )
    steps = _steps(job, rows)
    if sweep.scheduler.type != "none" and steps is not None:
        count = evaluations(job) or 0
        if job.training.eval_steps:
            count = math.ceil(steps / job.training.eval_steps)
        if count and count <= sweep.scheduler.grace_period:
            notes.append(
                f"{sweep.scheduler.type} will stop nothing: a trial of {steps} steps is evaluated {count} times."
            )
    return SweepPlan(
        sweep,
        trial,
        trials,
        layout,
        memory,
        trial.fits,
        steps,
        _seconds(spec, trial, layout, trials, steps, sizes, rows),
        (*notes, *trial.notes),
    )


def _total(plan: Plan) -> int:
    return plan.memory.total if plan.memory else 0


def _jobs(spec: JobSpec) -> list[JobSpec]:
    assert spec.sweep is not None
    found = []
    for number, parameters in enumerate(combinations(dimensions(spec.sweep.space))):
        if number == TRIED:
            break
        found.append(trial_job(spec, parameters))
    return found


def trial_plan(plan: Plan, job: JobSpec) -> Plan:
    """A trial's plan on the workers of its sweep: their number, what they have, its own batches."""
    steps, size = accumulation(job)
    micro = job.training.micro_batch_size
    batch = {
        "train_batch_size": plan.num_workers * micro * steps,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    return replace(
        plan,
        micro_batch_size=micro,
        gradient_accumulation_steps=steps,
        global_batch_size=size,
        deepspeed={key: batch.get(key, value) for key, value in plan.deepspeed.items()},
        sizes=(),
        serving=None,
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
    held_out = job.data.val_set_size
    count = rows.count - (held_out if isinstance(held_out, int) else round(rows.count * held_out))
    steps = training.num_epochs * math.ceil(max(1, count) / accumulation(job)[1])
    return min(steps, training.max_steps or steps)


def _seconds(
    spec: JobSpec,
    plan: Plan,
    layout: Layout,
    trials: int,
    steps: int | None,
    sizes: ModelSizes | None,
    rows: RowFacts,
) -> float | None:
    """Twice two operations for each parameter and token (forward, and backward through a frozen base), over what the
    workers can do; rows are taken for half as long as the longest."""
    if steps is None or sizes is None:
        return None
    tokens = steps * plan.global_batch_size * (rows.longest or plan.sequence_len) / 2
    one = CORE_FLOPS * plan.bundle.get("CPU", 1)
    speed = (GPU_FLOPS * plan.bundle["GPU"] if plan.use_gpu else one) * plan.num_workers
    share = _share(spec, spec.sweep.scheduler.type if spec.sweep else "none")
    return START_S + trials * share * 4 * sizes.parameters * tokens / speed / layout.groups


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
