"""Rules across sections. Each returns problems, so that all are told at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial

from peft_dist.catalog import METHODS, config_class
from peft_dist.contract import PromptMethod

from ..errors import closest
from .conditions import parse_comparison
from .job import DatasetSpec, DeploySpec, GateSpec, JobSpec, ModelSpec
from .live_metrics import OF_SHADOW, live_metrics
from .names import ADAPTER
from .places import Path, Problem
from .row_files import COMPRESSED, PLAIN, READ, unread
from .sharing import keeps_past
from .tasks import TASKS, evaluated_types, measured_metrics, task_type
from .words import show
from .workers import GroupSize, forwards, group_sizes


def check_rules(spec: JobSpec, written: Collection[Path], warnings: list[str]) -> list[Problem]:
    """What breaks a rule across sections; `written` are the keys that stand in the file."""
    found = [
        *_name(spec),
        *_bits(spec),
        *_batch(spec, written),
        *_gate(spec),
        *(check_deploy(spec.deploy) if spec.deploy else ()),
        *_evaluation(spec),
        *_secrets(spec),
        *_task(spec),
        *_row_files(spec),
        *_packing(spec),
        *_recomputing(spec),
    ]
    warnings += _warnings(spec, written)
    return found


def _name(spec: JobSpec) -> Iterator[Problem]:
    if spec.register_.name is None and not ADAPTER.fullmatch(spec.name):
        yield Problem(
            ("name",),
            f"has {len(spec.name)} letters, and the adapter, which takes the job's name, may have 63.",
            "Shorten it, or write register: {name: ...}.",
        )


def _bits(spec: JobSpec) -> Iterator[Problem]:
    model = spec.model
    if model.load_in_4bit and model.load_in_8bit:
        yield Problem(
            ("model", "load_in_8bit"), "true beside model.load_in_4bit: true.", "Keep one of the two."
        )
    for name, field in ModelSpec.model_fields.items():
        value = getattr(model, name)
        if name.startswith("bnb_4bit_") and not model.load_in_4bit and value != field.default:
            yield Problem(
                ("model", name),
                f"{show(value)}: of a 4-bit base, and model.load_in_4bit is false.",
                "Write load_in_4bit: true beside it, or remove it.",
            )


def accumulation(spec: JobSpec) -> tuple[int, int]:
    """(gradient_accumulation_steps, global_batch_size) of a spec that keeps the rules, with the most workers that it
    takes."""
    workers, micro = spec.resources.max_workers, spec.training.micro_batch_size
    if (size := spec.training.global_batch_size) is not None:
        return forwards(size, micro, workers), size
    steps = spec.training.gradient_accumulation_steps or 1
    return steps, workers * micro * steps


def sizes(spec: JobSpec) -> tuple[GroupSize, ...]:
    """The numbers of workers with which the job can step, ascending; the last is as good as its largest."""
    _, size = accumulation(spec)
    return group_sizes(
        spec.resources.min_workers, spec.resources.max_workers, size, spec.training.micro_batch_size
    )


def _batch(spec: JobSpec, written: Collection[Path]) -> Iterator[Problem]:
    training, workers = spec.training, spec.resources.max_workers
    step, size = workers * training.micro_batch_size, training.global_batch_size
    if size is None:
        return
    path: Path = ("training", "global_batch_size")
    if workers > spec.resources.min_workers:
        yield from _elastic_batch(spec, size, path)
        return
    times = f"{workers} worker{'s' * (workers > 1)} x {training.micro_batch_size} rows"
    if size % step:
        near = sorted({max(step, size // step * step), (size // step + 1) * step})
        nearest = " or ".join(str(each) for each in near)
        yield Problem(
            path, f"{size} does not divide into {times} = {step}.", f"The nearest that do: {nearest}."
        )
    elif training.gradient_accumulation_steps not in (None, size // step):
        yield Problem(
            path,
            f"{size} is not {times} x {training.gradient_accumulation_steps} accumulation steps"
            f" = {step * (training.gradient_accumulation_steps or 1)}.",
            f"Remove training.gradient_accumulation_steps: {size // step} follows from the others.",
        )


def _elastic_batch(spec: JobSpec, size: int, path: Path) -> Iterator[Problem]:
    """Any number of workers shares a batch; each needs a row of it."""
    training, resources = spec.training, spec.resources
    if size < resources.max_workers:
        yield Problem(
            path,
            f"{size} rows are fewer than the {resources.max_workers} workers that may share them.",
            f"Write at least {resources.max_workers}, or lower resources.num_workers.",
        )
        return
    steps = forwards(size, training.micro_batch_size, resources.max_workers)
    if training.gradient_accumulation_steps not in (None, steps):
        yield Problem(
            path,
            f"{size} rows over {resources.max_workers} workers x {training.micro_batch_size} rows are {steps} "
            f"accumulation step{'s' * (steps > 1)}, not {training.gradient_accumulation_steps}.",
            "Remove training.gradient_accumulation_steps: it follows from the others.",
        )


def produced_metrics(spec: JobSpec) -> list[str]:
    """The names that a gate may use: what this run measures, of itself, of the base, of production."""
    measured = ["eval_loss"] if has_evaluation(spec) else []
    measured += [name for name in measured_metrics(spec) if has_evaluation(spec)]
    return ["train_loss", *measured, *(f"{of}.{name}" for of in ("base", "production") for name in measured)]


def has_evaluation(spec: JobSpec) -> bool:
    """Whether any row is evaluated."""
    return bool(spec.data.val_set_size or spec.eval.datasets)


def _gate(spec: JobSpec) -> Iterator[Problem]:
    if spec.deploy is None or (gate := spec.deploy.gate) is None:
        return
    path: Path = ("deploy", "gate")
    written = list(_form(gate, path, 'gate: {all: ["eval_loss < base.eval_loss"]}'))
    yield from written
    if not written:
        key, metrics = "all" if gate.all is not None else "any", produced_metrics(spec)
        for index, text in enumerate(_conditions(gate)):
            hint = partial(_how_to_measure, spec, metrics=metrics)
            yield from _condition((*path, key, index), text, metrics, "by this job", hint)


def _form(gate: GateSpec, path: Path, example: str) -> Iterator[Problem]:
    """A gate, or what has its form, has one of two lists with something in it."""
    if (gate.all is None) == (gate.any is None):
        problem = "has both all and any." if gate.all is not None else "has neither all nor any."
        yield Problem(path, problem, f"Write {example}.")
    elif not _conditions(gate):
        what = str(path[-1])
        says = "it then always holds" if what == "gate" else "nothing is then taken back by itself"
        yield Problem(
            (*path, "all" if gate.all is not None else "any"),
            "is an empty list.",
            f"Write a condition, or remove the {what}: {says}.",
        )


def check_deploy(deploy: DeploySpec) -> Iterator[Problem]:
    """What breaks a rule across the keys of `deploy` itself; paths begin with `deploy`."""
    yield from _rollout(deploy)
    yield from _scale(deploy)


def _rollout(deploy: DeploySpec) -> Iterator[Problem]:
    """`deploy.rollout`: what it is watched for must be measured."""
    rollout = deploy.rollout
    if rollout.rollback is None:
        return
    path: Path = ("deploy", "rollout", "rollback")
    if not rollout.is_watched:
        yield Problem(
            path,
            "is never looked at: the version takes the alias at once.",
            "Write bake: 10m beside it, or canary_percent below 100.",
        )
    written = list(_form(rollout.rollback, path, 'rollback: {any: ["error_rate > 0.05"]}'))
    yield from written
    if not written:
        key = "all" if rollout.rollback.all is not None else "any"
        metrics = live_metrics(shadow=rollout.shadow_percent > 0)
        for index, text in enumerate(_conditions(rollout.rollback)):
            yield from _condition((*path, key, index), text, metrics, "of a rollout", partial(_live, metrics))


def _live(metrics: list[str], name: str) -> str:
    if name in OF_SHADOW:
        return "Set deploy.rollout.shadow_percent above 0."
    near = closest(name, metrics)
    nearest = f"Closest: '{near[0]}'. " if near else ""
    return f"{nearest}It measures: {', '.join(metrics)}."


def _scale(deploy: DeploySpec) -> Iterator[Problem]:
    """`deploy.scale`: bounds that leave room between them."""
    if deploy.scale is None:
        return
    low, most = deploy.bounds
    if low > most:
        yield Problem(
            ("deploy", "scale", "max_replicas"),
            f"{most} is below the {low} replicas that there are at least.",
            f"Write at least {low}, or lower deploy.scale.min_replicas.",
        )
    elif "num_replicas" in deploy.model_fields_set and not low <= deploy.num_replicas <= most:
        yield Problem(
            ("deploy", "num_replicas"),
            f"{deploy.num_replicas} is not between the bounds of deploy.scale, {low} and {most}.",
            "Remove it: deploy.scale says how many there are.",
        )


def _conditions(gate: GateSpec) -> tuple[str, ...]:
    return gate.all if gate.all is not None else gate.any or ()


def _condition(
    path: Path, text: str, metrics: list[str], where: str, hint: Callable[[str], str]
) -> Iterator[Problem]:
    try:
        comparison = parse_comparison(text)
    except ValueError as error:
        yield Problem(path, str(error))
        return
    for name in comparison.names:
        if name not in metrics:
            yield Problem(path, f"'{name}' is not measured {where}.", hint(name))


def _how_to_measure(spec: JobSpec, name: str, metrics: list[str]) -> str:
    bare = name.split(".")[-1]
    possible = TASKS[evaluated_types(spec)[0]].metrics
    if bare in (*possible, "eval_loss") and not has_evaluation(spec):
        return "Nothing is evaluated: set data.val_set_size above 0, or give eval.datasets."
    if bare in possible:
        return f"Write eval: {{metrics: [{', '.join((*spec.eval.metrics, bare))}]}}."
    near = closest(name, metrics)
    nearest = f"Closest: '{near[0]}'. " if near else ""
    return f"{nearest}It measures: {', '.join(metrics)}."


def _evaluation(spec: JobSpec) -> Iterator[Problem]:
    if not spec.eval.metrics:
        return
    if not has_evaluation(spec):
        yield Problem(
            ("eval", "metrics"),
            "there are no rows to evaluate.",
            "Set data.val_set_size above 0, or give eval.datasets.",
        )
        return
    section = "eval" if spec.eval.datasets else "data"
    for index, kind in enumerate(evaluated_types(spec)):
        possible = TASKS[kind].metrics
        if not possible:
            names = ", ".join(spec.eval.metrics)
            answered = [each for each, row in TASKS.items() if row.task == TASKS[kind].task and row.metrics]
            yield Problem(
                (section, "datasets", index, "type"),
                f"rows of type '{kind}' have no answer to compare, as eval.metrics ({names}) must.",
                f"Use {', '.join(answered)}, or remove eval.metrics.",
            )
            continue
        for place, name in enumerate(spec.eval.metrics):
            if index == 0 and name not in possible:
                yield Problem(
                    ("eval", "metrics", place),
                    f"'{name}' is not measured of rows of type '{kind}'.",
                    f"Of those: {', '.join(possible)}.",
                )


_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def _secrets(spec: JobSpec) -> Iterator[Problem]:
    """A value that is neither `env` nor `file:/path` may be the secret itself: it is never repeated."""
    for name, source in spec.secrets.items():
        path: Path = ("secrets", name)
        if not _VARIABLE.match(name):
            yield Problem(
                ("secrets",), "a name is not that of an environment variable.", "Write {HF_TOKEN: env}."
            )
        elif source.startswith("file:") and not os.path.isabs(source.removeprefix("file:")):
            yield Problem(path, "the file's path is not absolute.", "Write file:/path.")
        elif source != "env" and not source.startswith("file:"):
            yield Problem(
                path,
                "is a literal; a secret never stands in a job.",
                f"Write {name}: env (the variable {name} of whoever submits), or {name}: file:/path.",
            )


def _task(spec: JobSpec) -> Iterator[Problem]:
    entry = METHODS.get(spec.adapter.type.upper())
    task = task_type(spec)
    if entry and task not in entry.task_types:
        yield Problem(
            ("adapter", "type"),
            f"{spec.adapter.type} does not train {task}, which rows of type '{spec.data.datasets[0].type}' need.",
            f"It trains: {', '.join(entry.task_types)}.",
        )
    for section, index, dataset in _datasets(spec):
        if TASKS[dataset.type].task != task:
            yield Problem(
                (section, "datasets", index, "type"),
                f"rows of type '{dataset.type}' train {TASKS[dataset.type].task}, those of the first dataset {task}.",
                "One job trains one task.",
            )


def _row_files(spec: JobSpec) -> Iterator[Problem]:
    """What a path's ending says already; what a file holds, whoever reads it."""
    for section, index, dataset in _datasets(spec):
        if (found := unread(dataset.path)) is not None:
            how = 'Write its texts as JSON lines, {"text": "..."} each, with type: text.'
            yield Problem(
                (section, "datasets", index, "path"),
                f"{show(dataset.path)}: rows are not read from {found} files.",
                f"They are from {', '.join(READ)}, also compressed ({', '.join(COMPRESSED)})."
                + (f" {how}" if found in PLAIN else ""),
            )


def _datasets(spec: JobSpec) -> Iterator[tuple[str, int, DatasetSpec]]:
    for section, datasets in (("data", spec.data.datasets), ("eval", spec.eval.datasets)):
        for index, dataset in enumerate(datasets):
            yield section, index, dataset


def _recomputing(spec: JobSpec) -> Iterator[Problem]:
    if spec.training.gradient_checkpointing is True and keeps_past(spec.adapter.type):
        yield Problem(
            ("training", "gradient_checkpointing"),
            f"true: {spec.adapter.type} keeps its tokens in the base's cache, which layers that run again in the "
            "backward have not.",
            "Write auto or false, or take prompt_tuning or p_tuning.",
        )


def _packing(spec: JobSpec) -> Iterator[Problem]:
    """`data.sample_packing`: which rows can share a sequence."""
    if not spec.data.sample_packing:
        return
    path: Path = ("data", "sample_packing")
    kind, entry = spec.data.datasets[0].type, METHODS.get(spec.adapter.type.upper())
    if (task := task_type(spec)) != "CAUSAL_LM":
        yield Problem(
            path,
            f"true: rows of type '{kind}' train {task}, whose loss reads each row as a whole.",
            "Remove it, or use chat, prompt_completion, alpaca or text.",
        )
        return
    method = config_class(spec.adapter.type.upper()) if entry is not None else None
    if keeps_past(spec.adapter.type):
        yield Problem(
            path,
            f"true: {spec.adapter.type} keeps its tokens in the base's cache, where all rows of a sequence would share "
            "one beginning.",
            "Remove it, or take prompt_tuning or p_tuning.",
        )
    elif (
        method is not None and issubclass(method, PromptMethod) and method.targets is not PromptMethod.targets
    ):
        yield Problem(
            path,
            f"true: {spec.adapter.type} counts the loss of its own context with each row's.",
            "Remove it, or take prompt_tuning or p_tuning.",
        )


def _warnings(spec: JobSpec, written: Collection[Path]) -> Iterator[str]:
    if spec.training.max_steps and ("training", "num_epochs") in written:
        yield "training.max_steps ends the run, whatever training.num_epochs says."
    if spec.deploy and spec.deploy.gate is None:
        yield "deploy has no gate: every version of this job is served."
