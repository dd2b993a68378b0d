"""What to say of a key that does not exist: where it lives, or what is closest."""

from __future__ import annotations

from dataclasses import fields as dataclass_fields

from pydantic import BaseModel

from peft_dist.catalog import METHODS, config_class

from ..errors import closest
from .alias_table import BY_NAME, ROWS, SECTION_ALIASES
from .job import JobSpec
from .places import Path, Problem, dotted
from .words import field_at, known_paths, model_in

SHORT = {
    "lr": "training.learning_rate",
    "epochs": "training.num_epochs",
    "batch_size": "training.micro_batch_size",
    "steps": "training.max_steps",
    "gpu": "resources.gpus_per_worker",
    "gpus": "resources.gpus_per_worker",
    "cpu": "resources.cpus_per_worker",
    "cpus": "resources.cpus_per_worker",
    "workers": "resources.num_workers",
    "rank": "adapter.r",
    "base": "model.base_model",
    "gate": "deploy.gate",
}
"""Short words for keys, too short for their spelling to tell what was meant."""

_ANYWHERE = known_paths(JobSpec)


def unknown_key(path: Path) -> Problem:
    """The problem with a key that no section has."""
    key = str(path[-1])
    if key in SHORT:
        return Problem(path, "no such key.", f"Write {SHORT[key]}.")
    near = closest(
        key, _keys_beside(path) + ([row.name for row in ROWS if row.target] if len(path) == 1 else [])
    )
    elsewhere = _lives_at(path)
    if elsewhere and not (near and _is_misspelt(key, near[0])):
        return Problem(path, "no such key here.", f"Write it as {elsewhere}.")
    if near:
        return Problem(path, "no such key.", f"Closest: '{dotted((*path[:-1], near[0]))}'.")
    return Problem(path, "no such key.", f"Keys here: {', '.join(_keys_beside(path))}.")


def _keys_beside(path: Path) -> list[str]:
    names = [field.alias or name for name, field in _section(path).model_fields.items()]
    return [*names, "extends"] if len(path) == 1 else names


def _section(path: Path) -> type[BaseModel]:
    if len(path) == 1:
        return JobSpec
    field = field_at(JobSpec, path[:-1])
    return (model_in(field.annotation) if field else None) or JobSpec


def _is_misspelt(key: str, near: str) -> bool:
    return bool(closest(key, [near])) and abs(len(key) - len(near)) <= 2 and key[:1] == near[:1]


def _lives_at(path: Path) -> str | None:
    """The dotted key that has this name, elsewhere; an alias's target; a field of the adapter's method."""
    key = str(path[-1])
    ends = [name for name in _ANYWHERE if name.split(".")[-1] == key and name != dotted(path)]
    if ends:
        return " or ".join(_as_list(name) for name in sorted(ends, key=_shortest_first)[:2])
    if (row := BY_NAME.get(key)) and row.target:
        return row.target
    if (inside := SECTION_ALIASES.get(f"training.{key}")) is not None:
        return inside[0]
    return f"adapter.{key}" if key in _adapter_fields() and path[0] != "adapter" else None


def _as_list(name: str) -> str:
    return name.replace(".datasets.", ".datasets[].")


def _shortest_first(name: str) -> tuple[int, str]:
    return name.count("."), name


def _adapter_fields() -> set[str]:
    names = {"alpha", "dropout"}
    for kind in METHODS:
        names |= {field.name for field in dataclass_fields(config_class(kind)) if field.init}
    return names
