"""A job's stored form, its hash, and what differs between two jobs.

What is stored is resolved: every default stands in it, and `format: 1`. The hash leaves out what stands at its
default, so that a key added later does not make old runs look new.
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

from ruamel.yaml import YAML

from .adapter import method_fields, resolved_fields
from .document import parse_document
from .job import JobSpec
from .load import FORMAT, check_format, spec_from_values
from .rules import accumulation
from .space import dimensions
from .words import field_at

MAY_CHANGE = (
    "training.num_epochs",
    "training.max_steps",
    "training.save_steps",
    "training.saves_per_epoch",
    "training.eval_steps",
    "training.evals_per_epoch",
    "resources",
    "deepspeed",  # a checkpoint knows of no stage
    "storage.keep_best",
    "storage.keep_latest",
    "secrets",
    "cluster",
    "retry",
    "eval.max_rows",
    "register.alias",
    "deploy",
    "sweep.num_trials",
    "sweep.max_concurrent",
    "sweep.pack",
    "sweep.budget",
    "tracking",
)
"""Keys that `--resume` allows to differ."""

_BATCH = ("training.micro_batch_size", "training.gradient_accumulation_steps", "training.global_batch_size")
"""Likewise, where the rows per step stay the same."""


def resolved_values(spec: JobSpec) -> dict[str, Any]:
    """The job as plain values, every default filled in, those that follow from other keys too."""
    values = spec.model_dump(mode="json", by_alias=True)
    swept = {key for each in dimensions(spec.sweep.space) for key in each.keys} if spec.sweep else set()
    if "adapter.type" not in swept:  # else each trial's method has fields of its own
        values["adapter"] = {
            "type": spec.adapter.type,
            "init_from": spec.adapter.init_from,
            **resolved_fields(spec.adapter),
        }
    training = values["training"]
    if training["global_batch_size"] is None and training["gradient_accumulation_steps"] is None:
        training["gradient_accumulation_steps"] = 1
    for steps, per_epoch in (("save_steps", "saves_per_epoch"), ("eval_steps", "evals_per_epoch")):
        if training[steps] is None and training[per_epoch] is None:
            training[per_epoch] = 1
    values["register"]["name"] = values["register"]["name"] or spec.name
    return values


def resolved_yaml(spec: JobSpec) -> str:
    """The stored form: YAML that `load_job` reads back to a job with the same hash."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 110
    yaml.indent(mapping=2, sequence=4, offset=2)
    text = io.StringIO()
    yaml.dump({"format": FORMAT, **resolved_values(spec)}, text)
    return text.getvalue()


def load_stored(text: str, source: str = "spec.yaml") -> JobSpec:
    """A stored job. Keys that this version does not know are passed over; a newer format is refused by name.

    Raises:
        SpecError: the text is damaged, or of a newer format.
    """
    tree = parse_document(text, source)
    check_format(tree)
    _drop_unknown(tree.values, ())
    return spec_from_values(tree.values, source)


def _drop_unknown(values: dict[str, Any], path: tuple[str, ...]) -> None:
    for key in list(values):
        here = (*path, key)
        if path[:1] in (("adapter",), ("deepspeed",), ("secrets",)):
            continue
        if here[:2] in (("resources", "labels"), ("sweep", "space")):
            continue
        if field_at(JobSpec, here) is None:
            del values[key]
        elif isinstance(values[key], dict):
            _drop_unknown(values[key], here)


def canonical_values(spec: JobSpec) -> dict[str, Any]:
    """The job without what stands at its default."""
    values = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    known = method_fields(spec.adapter.type)
    given = resolved_fields(spec.adapter)
    adapter = {name: value for name, value in given.items() if value != known[name].default}
    ours = {"type": spec.adapter.type, "init_from": spec.adapter.init_from}
    ours = {name: value for name, value in ours.items() if value not in ("lora", None)}
    values["adapter"] = {**ours, **adapter}
    training = values.get("training", {})
    for key, beside in _IMPLIED:
        if training.get(key) == 1 and training.get(beside) is None:
            del training[key]
    if values.get("register", {}).get("name") == spec.name:
        del values["register"]["name"]
    # `deploy: {}` asks for a deployment, unlike any other empty section
    return {key: value for key, value in values.items() if key == "deploy" or value not in ({}, None)}


_IMPLIED = (
    ("gradient_accumulation_steps", "global_batch_size"),
    ("saves_per_epoch", "save_steps"),
    ("evals_per_epoch", "eval_steps"),
)
"""1 where the other is not given either: writing it says nothing new."""


def canonical_hash(spec: JobSpec) -> str:
    """sha256, hexadecimal, over the canonical values as JSON with sorted keys."""
    text = json.dumps(canonical_values(spec), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_keys(old: JobSpec, new: JobSpec) -> list[str]:
    """Dotted keys whose resolved values differ, sorted; a list that differs is one key."""
    before, after = _flat(resolved_values(old)), _flat(resolved_values(new))
    missing = object()
    return sorted(key for key in before | after if before.get(key, missing) != after.get(key, missing))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = None if value == {} else value
    return found


def keys_that_bar_resume(old: JobSpec, new: JobSpec) -> list[str]:
    """The changed keys that `--resume` does not allow; none: the run may go on under the new job."""
    same_batch = accumulation(old)[1] == accumulation(new)[1]
    allowed = (*MAY_CHANGE, *(_BATCH if same_batch else ()))
    changed = changed_keys(old, new)
    return [key for key in changed if not any(key == each or key.startswith(f"{each}.") for each in allowed)]
