"""Where each value of a job was written, so that every message can say `file:line key`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import SpecError

Path = tuple[str | int, ...]
"""A key's way from the top: `("data", "datasets", 0, "path")`, written `data.datasets.0.path`."""

MISSING = object()


def dotted(path: Path) -> str:
    """`data.datasets.0.path`."""
    return ".".join(str(part) for part in path)


class Place(NamedTuple):
    """Where a value stands: line and column counted from 1 (0 where there is no file), and the key as written."""

    line: int
    column: int
    source: str
    key: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line} {self.key}" if self.line else f"{self.source} {self.key}"


@dataclass(frozen=True)
class Problem:
    """A rule that the value at `path` breaks, and what to do about it."""

    path: Path
    problem: str
    hint: str | None = None


class SpecErrors(SpecError):
    """Several errors of one file, each on its own line, in the order of the file."""

    def __init__(self, errors: Iterable[SpecError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(str(error) for error in self.errors))

    def __reduce__(self):
        return type(self), (self.errors,)

    def to_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The machine form: the first error's, and all of them under `errors`."""
        return {**super().to_dict(), "errors": [error.to_dict() for error in self.errors]}


def raise_all(errors: list[SpecError]) -> None:
    """Raises nothing, the one error, or all of them together."""
    unique = list({str(error): error for error in errors}.values())
    if len(unique) == 1:
        raise unique[0]
    if unique:
        raise SpecErrors(unique)


@dataclass
class Tree:
    """Plain values (mappings, lists, scalars) and the place of each."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Path, Place] = field(default_factory=dict)

    def get(self, path: Path) -> Any:
        """The value at `path`, or MISSING."""
        node: Any = self.values
        for part in path:
            is_index = isinstance(node, list) and isinstance(part, int) and part < len(node)
            if not is_index and not (isinstance(node, dict) and part in node):
                return MISSING
            node = node[part]
        return node

    def put(self, path: Path, value: Any, places: Mapping[Path, Place]) -> None:
        """Sets `value` at `path`, whose parents are mappings or absent; `places` are relative to `path`."""
        node: Any = self.values
        for depth, part in enumerate(path[:-1], start=1):
            if isinstance(node, dict) and node.get(str(part)) is None:
                node[part] = {}
                self.places.setdefault(path[:depth], places[()])
            node = node[part]
        self._forget(path)
        node[path[-1]] = value
        self.places.update({(*path, *rest): place for rest, place in places.items()})

    def take(self, path: Path) -> tuple[Any, dict[Path, Place]]:
        """Removes the value at `path`; returns it and its places, relative to `path`."""
        value, places = self.get(path), self.places_under(path)
        parent = self.get(path[:-1])
        del parent[path[-1]]
        self._forget(path)
        return value, places

    def places_under(self, path: Path) -> dict[Path, Place]:
        """The places of the value at `path` and of all below it, relative to `path`."""
        size = len(path)
        return {key[size:]: place for key, place in self.places.items() if key[:size] == path}

    def _forget(self, path: Path) -> None:
        for key in [key for key in self.places if key[: len(path)] == path]:
            del self.places[key]

    def overlaid(self, other: Tree) -> Tree:
        """A tree in which what `other` says replaces what this one says: mappings merge, lists are replaced."""
        merged = Tree(other.source, deepcopy(self.values), dict(self.places))
        merged._overlay((), other)
        return merged

    def _overlay(self, path: Path, other: Tree) -> None:
        above, below = other.get(path), self.get(path)
        if isinstance(above, dict) and isinstance(below, dict) and not _is_whole(path):
            if path in other.places:
                self.places[path] = other.places[path]
            for key in above:
                self._overlay((*path, key), other)
        else:
            self.put(path, deepcopy(above), other.places_under(path) or {(): other.nearest(path)})

    def nearest(self, path: Path) -> Place:
        """The place of `path`, or of the closest of its parents that was written."""
        for size in range(len(path), 0, -1):
            if place := self.places.get(path[:size]):
                return place if size == len(path) else place._replace(key=dotted(path))
        return Place(1 if self.source != "--set" else 0, 1, self.source, dotted(path))

    def error(self, problem: Problem) -> SpecError:
        """The problem as an error that says where."""
        return SpecError(problem.problem, where=str(self.nearest(problem.path)), hint=problem.hint)

    def errors(self, problems: Iterable[Problem]) -> list[SpecError]:
        """All problems as errors, in the order of the file."""
        ordered = sorted(problems, key=lambda each: _reading_order(self.nearest(each.path), self.source))
        return [self.error(problem) for problem in ordered]


def _is_whole(path: Path) -> bool:
    """A DeepSpeed config, a gate or what a key of a sweep is drawn from is one value: half of two of them is none."""
    whole = {("deepspeed",), ("deploy", "gate"), ("deploy", "rollout", "rollback"), ("sweep", "scheduler")}
    return path in whole or (len(path) == 3 and path[:2] == ("sweep", "space"))


def _reading_order(place: Place, first: str) -> tuple:
    return (place.source != first, place.source, place.line, place.column)
