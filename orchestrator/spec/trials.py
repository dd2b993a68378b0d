"""The job of one trial, and what breaks a rule of a sweep: its space is tried against the schema, the method and the
rules across keys before anything starts."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import closest
from .adapter import check_adapter
from .alias_table import BY_NAME
from .deepspeed_keys import check_deepspeed
from .job import JobSpec
from .places import Path, Problem, Tree, dotted
from .rules import check_rules, has_evaluation, produced_metrics
from .space import (
    LISTS,
    PAIRED,
    RANGES,
    SPACE,
    Dimension,
    Parameters,
    check_space,
    combinations,
    dimensions,
    places_of,
    size_of,
)
from .strict import strict_job
from .sweep import SchedulerSpec, SweepSpec
from .unknown import unknown_key
from .words import explain, field_at, show

OF_ALL_TRIALS = (
    "name", "extends", "cluster", "resources", "storage", "retry", "secrets", "eval", "register", "deploy", "sweep",
    "tracking", "model.base_model", "model.revision", "model.trust_remote_code", "data.datasets", "data.val_set_size",
)  # fmt: skip
"""Keys that hold for a sweep as a whole: trials share their workers, and are measured alike."""

_INSTEAD = {
    "training.global_batch_size": ("training", "gradient_accumulation_steps"),
    "training.gradient_accumulation_steps": ("training", "global_batch_size"),
    "training.save_steps": ("training", "saves_per_epoch"),
    "training.saves_per_epoch": ("training", "save_steps"),
    "training.eval_steps": ("training", "evals_per_epoch"),
    "training.evals_per_epoch": ("training", "eval_steps"),
}
"""Keys of which one is written: a trial that sets it does without the other."""

_WHOLE = ("adapter", "deepspeed")
"""Sections that a trial may set as a whole: methods have other fields each."""

DEFAULT_TRIALS = 10


def trial_job(spec: JobSpec, parameters: Parameters) -> JobSpec:
    """The job of one trial: the sweep's without the sweep, its gate and its deployment, these keys set.

    Raises:
        ValueError: the keys or their values break a rule; a sweep that keeps `check_sweep` has no such trial among
            those that were tried.
    """
    values = spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    job, problems = tried(values, parameters)
    if job is None or problems:
        said = "; ".join(f"{dotted(each.path)}: {each.problem}" for each in problems)
        raise ValueError(f"the trial with {shown(parameters)} breaks a rule: {said}")
    return job.model_copy(update={"deploy": None})


def saved_where_evaluated(job: JobSpec) -> JobSpec:
    """A trial's job that saves a checkpoint at each evaluation, where it does not say when to save: what a trial is
    judged by is then not trained again, whatever becomes of driver and workers."""
    training = job.training
    if training.save_steps or training.saves_per_epoch:
        return job
    every = {"save_steps": training.eval_steps, "saves_per_epoch": training.evals_per_epoch}
    return job.model_copy(update={"training": training.model_copy(update=every)})


def shown(parameters: Parameters) -> str:
    """`adapter.r 8, training.learning_rate 0.001`."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {_inside(value)}"
        for key, value in parameters.items()
    )


def _inside(value: Any) -> str:
    """A section without its braces."""
    return f"({shown(value)})" if isinstance(value, dict) else str(value)


def tried(values: Mapping[str, Any], parameters: Parameters) -> tuple[JobSpec | None, list[Problem]]:
    """The job that plain values and a trial's keys make, and what breaks a rule."""
    tree = Tree("trial", {key: copy.deepcopy(value) for key, value in values.items() if key != "sweep"})
    for key, value in parameters.items():
        _put(tree.values, key, value)
    problems = check_adapter(tree)
    try:
        spec = strict_job(tree.values)
    except ValidationError as error:
        return None, problems + explain(JobSpec, tree.values, error.errors(), unknown_key)
    return spec, [*problems, *check_rules(spec, (), []), *check_deepspeed(spec)]


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key; a number is an index where there is a list."""
    if other := _INSTEAD.get(key):
        section = values.get(other[0])
        if isinstance(section, dict):
            section.pop(other[1], None)
    *way, last = key.split(".")
    node: Any = values
    for part in way:
        if isinstance(node, list):
            node = node[int(part)]
        else:
            if not isinstance(node.get(part), dict | list):
                node[part] = {}
            node = node[part]
    node[int(last) if isinstance(node, list) else last] = copy.deepcopy(value)


def starts_of(spec: JobSpec) -> list[str]:
    """Every `adapter.init_from` of a sweep's trials; none of a job without a sweep."""
    if spec.sweep is None:
        return []
    drawn = [owner[name] for owner, name in places_of(spec.sweep.space, "adapter", "init_from")]
    own = spec.adapter.init_from
    return list(dict.fromkeys([*drawn, *([own] if own else [])]))


def count_trials(sweep: SweepSpec) -> int:
    """How many trials a sweep begins at most."""
    size = size_of(dimensions(sweep.space))
    count = sweep.num_trials or (size if sweep.searcher == "grid" else None) or DEFAULT_TRIALS
    return min(count, size or count, sweep.budget.trials or count)


def evaluations(spec: JobSpec, num_rows: int | None = None) -> int | None:
    """How often a trial is evaluated; None where only the number of its rows would tell."""
    training = spec.training
    if not has_evaluation(spec):
        return 0
    if training.eval_steps is not None and training.max_steps is not None:
        return -(-training.max_steps // training.eval_steps)
    if training.max_steps is None and training.eval_steps is None:
        return training.num_epochs * (training.evals_per_epoch or 1)
    return None


def check_sweep(spec: JobSpec, values: Mapping[str, Any]) -> list[Problem]:
    """What breaks a rule of a job's sweep.

    Args:
        values: the job as plain values, aliases resolved.
    """
    sweep = spec.sweep
    if sweep is None:
        return []
    if problems := check_space(sweep.space):
        return problems
    space = dimensions(sweep.space)
    if problems := list(_keys(space)):
        return problems
    problems, jobs = _trials(space, values)
    if not problems:
        problems = [
            *_searcher(sweep, space), *_metric(sweep, jobs), *_scheduler(sweep, jobs), *_pack(sweep, jobs)
        ]  # fmt: skip
    return problems


def _keys(space: Collection[Dimension]) -> Iterator[Problem]:
    every = [key for each in space for key in each.keys]
    for each in space:
        for key in each.keys:
            place = _place(each, key)
            path: Path = tuple(key.split("."))
            if not all(path):
                yield Problem(place, f"'{key}' is not a dotted key.", "Write such as training.learning_rate.")
            elif whole := next((each for each in every if key.startswith(f"{each}.")), None):
                yield Problem(
                    place, f"{key} is a part of {whole}, which is drawn too.", f"Write it within {whole}."
                )
            elif (other := dotted(_INSTEAD.get(key, ()))) in every[: every.index(key)]:
                yield Problem(
                    place, f"{key} and {other}, which is drawn too, say the same.", "Draw one of the two."
                )
            elif common := next((each for each in OF_ALL_TRIALS if f"{key}.".startswith(f"{each}.")), None):
                yield Problem(
                    place, f"{common} holds for all trials of a sweep.", "Set it outside sweep.space."
                )
            elif each.kind == PAIRED and any(_is_distribution(entry[key]) for entry in each.values):
                yield Problem(
                    place,
                    f"{key}: is drawn by itself, and paired holds values that go together.",
                    f"Write a value, or sweep.space.{key}.",
                )
            elif path[0] == "adapter" and len(path) > 1:
                continue  # its method knows
            elif len(path) == 1 and key in BY_NAME and (target := BY_NAME[key].target):
                yield Problem(place, f"{key} is another project's name.", f"Write it as {target}.")
            elif field_at(JobSpec, _with_indices(path)) is None:
                found = unknown_key(path)
                yield Problem(
                    place, f"{key}: {found.problem}" if each.kind == PAIRED else found.problem, found.hint
                )
            elif len(path) == 1 and path[0] not in _WHOLE:
                yield Problem(
                    place, f"{key} is a whole section.", f"Write one of its keys, such as {key}.KEY."
                )


def _is_distribution(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and next(iter(value)) in (*LISTS, *RANGES)


def _with_indices(path: Path) -> Path:
    return tuple(int(part) if isinstance(part, str) and part.isdigit() else part for part in path)


def _place(dimension: Dimension, key: str) -> Path:
    """Where a dimension's key stands in the job."""
    if dimension.kind != PAIRED:
        return (*SPACE, dimension.name)
    return (*SPACE, *(int(part) if part.isdigit() else part for part in dimension.name.split(".")))


def _searcher(sweep: SweepSpec, space: Collection[Dimension]) -> Iterator[Problem]:
    for each in space:
        if sweep.searcher == "grid" and not each.is_list:
            yield Problem(
                _place(each, each.name),
                f"{each.kind} has no end of values, and searcher: grid goes through all of them.",
                "Write {choice: [...]}, or searcher: random.",
            )
        if sweep.searcher == "optuna" and each.kind == "grid":
            yield Problem(
                _place(each, each.name),
                "grid asks for every value, and searcher: optuna chooses.",
                "Write choice, or searcher: grid.",
            )
    size = size_of(list(space))
    if size is not None and (sweep.num_trials or 0) > size:
        yield Problem(
            ("sweep", "num_trials"),
            f"{sweep.num_trials}, and the space has {size} combination{'s' * (size != 1)}: some would run twice.",
            f"Write {size} or less, or remove it.",
        )


def _trials(space: list[Dimension], values: Mapping[str, Any]) -> tuple[list[Problem], list[JobSpec]]:
    """What breaks a rule of the trials by which the space is tried, one problem a place; and the jobs of the others."""
    found: dict[Path, Problem] = {}
    jobs = []
    for parameters in combinations(space):
        job, problems = tried(values, parameters)
        if job is not None and not problems:
            jobs.append(job)
        for problem in problems:
            placed = _placed(problem, space, parameters)
            found.setdefault(placed.path, placed)
    return list(found.values()), jobs


def _placed(problem: Problem, space: Collection[Dimension], parameters: Parameters) -> Problem:
    """A problem of a trial's job as one of the key that makes it."""
    name = dotted(problem.path)
    for each in space:
        for key in each.keys:
            if name == key or name.startswith(f"{key}."):
                value = parameters[key]
                what = name if isinstance(value, dict) else show(value)
                says = problem.problem if what in problem.problem else f"{what}: {problem.problem}"
                says = f"{key}: {says}" if each.kind == PAIRED else says
                return Problem(_place(each, key), says + _drawn_from(each, value, problem), problem.hint)
    return Problem(SPACE, f"the trial with {shown(parameters)}: {name}: {problem.problem}", problem.hint)


def _drawn_from(dimension: Dimension, value: Any, problem: Problem) -> str:
    """Why a range gives a number of the wrong kind."""
    if dimension.kind in ("uniform", "loguniform") and "whole number" in problem.problem:
        return f" {dimension.kind} draws fractions: write randint, quniform or choice."
    return ""


def _metric(sweep: SweepSpec, jobs: Collection[JobSpec]) -> Iterator[Problem]:
    for job in jobs:
        metrics = [each for each in produced_metrics(job) if "." not in each]
        if sweep.metric not in metrics:
            near = closest(sweep.metric, metrics)
            hint = f"Closest: '{near[0]}'. " if near else ""
            if sweep.metric == "eval_loss":
                hint = "Nothing is evaluated: set data.val_set_size above 0, or give eval.datasets. "
            yield Problem(
                ("sweep", "metric"),
                f"'{sweep.metric}' is not measured by this job.",
                f"{hint}It measures: {', '.join(metrics)}.",
            )
            return


def _pack(sweep: SweepSpec, jobs: Collection[JobSpec]) -> Iterator[Problem]:
    if sweep.pack not in ("auto", 1) and any(job.training.base_dropout for job in jobs):
        yield Problem(
            ("sweep", "pack"),
            f"{sweep.pack}: training.base_dropout: true draws the base's own dropout for all rows of a forward, so "
            "its trials are not packed.",
            "Write pack: auto or 1, or base_dropout: false.",
        )


_READS = {"none": (), "asha": ("grace_period", "reduction_factor"), "median": ("grace_period",)}
"""Scheduler -> the keys beside its type that mean something to it."""


def _scheduler(sweep: SweepSpec, jobs: Collection[JobSpec]) -> Iterator[Problem]:
    kind = sweep.scheduler.type
    for name, field in SchedulerSpec.model_fields.items():
        if name not in ("type", *_READS[kind]) and getattr(sweep.scheduler, name) != field.default:
            reads = " or ".join(each for each, keys in _READS.items() if name in keys)
            yield Problem(
                ("sweep", "scheduler", name),
                f"{kind} does not read it.",
                f"Remove it, or write type: {reads}.",
            )
    if kind == "none":
        return
    if sweep.metric != "eval_loss":
        yield Problem(
            ("sweep", "scheduler"),
            f"{kind} compares trials while they train, when eval_loss alone is measured, not {sweep.metric}.",
            "Write metric: eval_loss, or scheduler: none.",
        )
        return
    for job in jobs:
        count = evaluations(job)
        if count is not None and count <= sweep.scheduler.grace_period:
            has = (
                "none" if count == 0 else "one, at its end" if count == 1 else f"{count}, the last at its end"
            )
            yield Problem(
                ("sweep", "scheduler"),
                f"{kind} has nothing to compare: it looks at trials from evaluation {sweep.scheduler.grace_period} on, "
                f"before their end, and a trial has {has}.",
                f"Write training.evals_per_epoch: {4 * sweep.scheduler.grace_period}, or training.eval_steps.",
            )
            return
