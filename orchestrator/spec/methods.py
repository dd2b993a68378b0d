"""The rows of `raypeft methods`: every adapter method, what it is, and the fields of its section."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from peft_dist.catalog import ALL_TASKS, METHODS, config_class

from ..errors import SpecError, closest
from .adapter import method_fields, method_names
from .places import MISSING
from .words import in_words

_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class FieldRow:
    """One key of the `adapter` section."""

    name: str
    takes: str
    default: Any
    """None also where it must be given; `is_required` says so."""
    is_required: bool
    help: str
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class MethodRow:
    """One method, as `adapter.type` names it."""

    name: str
    what: str
    paper: str | None
    """arXiv id."""
    tasks: tuple[str, ...]
    merges: bool
    """Whether it can be merged into the base."""
    fields: tuple[FieldRow, ...]

    @property
    def trains(self) -> str:
        """Its tasks in a word: `all`, or their names."""
        return "all" if set(self.tasks) == set(ALL_TASKS) else ", ".join(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        fields = [{**vars(field), "aliases": list(field.aliases)} for field in self.fields]
        return {**vars(self), "tasks": list(self.tasks), "fields": fields}


def method_row(name: str) -> MethodRow:
    """One method. Raises SpecError, with the closest name, where there is none."""
    kind = name.lower().replace("-", "_")
    if kind not in method_names():
        near = closest(kind, method_names())
        hint = f"Closest: '{near[0]}'." if near else "List them: raypeft methods"
        raise SpecError(f"'{name}' is not a method.", where="raypeft methods", hint=hint)
    return _row(kind)


def method_rows() -> list[MethodRow]:
    """All methods, in the catalog's order."""
    return [_row(name) for name in method_names()]


def _first_line(config: type) -> str:
    """What a config that an entry point names says of itself."""
    return (config.__doc__ or config.__name__).strip().splitlines()[0].rstrip(".")


def _row(name: str) -> MethodRow:
    known = method_fields(name)  # a method of another package is read now, and says what it is
    entry = METHODS[name.upper()]
    summary = entry.summary if entry.prefix is not None else _first_line(config_class(name.upper()))
    found = _ARXIV.search(summary)
    what = _ARXIV.sub("", summary).replace("()", "").strip()
    fields = tuple(
        FieldRow(
            each.name,
            in_words(each.annotation),
            None if each.default is MISSING else each.default,
            each.default is MISSING,
            each.help,
            each.aliases,
        )
        for each in known.values()
    )
    return MethodRow(name, what, found[1] if found else None, tuple(entry.task_types), entry.merges, fields)
