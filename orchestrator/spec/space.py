"""`sweep.space`: dotted keys and what their values are drawn from.

training.learning_rate: {loguniform: [1e-5, 5e-4]}
adapter.r: {choice: [8, 16, 32]}
paired: [{training.warmup_ratio: 0.0, training.lr_scheduler: linear}, {training.warmup_ratio: 0.1, ...}]
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import closest
from .places import Path, Problem, Tree
from .words import show

PAIRED = "paired"
SPACE: Path = ("sweep", "space")
LISTS = ("choice", "grid")
RANGES = {"uniform": 2, "loguniform": 2, "randint": 2, "quniform": 3}
"""Distributions over numbers, and how many numbers say which."""

Parameters = dict[str, Any]
"""Dotted key -> its value in one trial."""

_FORM = "Write KEY: {choice: [...]}, or uniform, loguniform, randint, quniform, grid."
_MOST_COMBINATIONS = 200
_DRAWN = 60


@dataclass(frozen=True)
class Dimension:
    """One thing that differs from trial to trial: a key, or several that go together."""

    name: str
    """The dotted key; `paired`, or `paired.N` where there are several lists."""
    kind: str
    """choice | grid | paired | uniform | loguniform | randint | quniform"""
    values: tuple[Any, ...] = ()
    """Of choice and grid the values, of paired the mappings, of a range its bounds (and step)."""

    @property
    def is_list(self) -> bool:
        """Whether it has a number of values that can be gone through."""
        return self.kind in (*LISTS, PAIRED)

    @property
    def count(self) -> int | None:
        """How many values it has; None where there is no end of them."""
        if self.is_list:
            return len(self.values)
        if self.kind == "randint":
            return int(self.values[1] - self.values[0])
        if self.kind == "quniform":
            low, high, step = self.values
            return round((high - low) / step) + 1
        return None

    @property
    def keys(self) -> tuple[str, ...]:
        """The dotted keys that it sets."""
        if self.kind != PAIRED:
            return (self.name,)
        return tuple(dict.fromkeys(key for each in self.values for key in each))

    def parameters(self, value: Any) -> Parameters:
        """What a value of it sets."""
        return dict(value) if self.kind == PAIRED else {self.name: value}

    def witnesses(self) -> tuple[Any, ...]:
        """Values by which its types and bounds are tried: all of a list, the ends of a range."""
        if self.is_list:
            return self.values
        low, high = self.values[:2]
        if self.kind == "randint":
            return tuple(dict.fromkeys((low, high - 1)))
        if self.kind == "quniform":
            return tuple(dict.fromkeys((whole(low), whole(low + self.values[2]), whole(high))))
        return low, low + 0.381966 * (high - low), high  # with one that is no whole number


def whole(value: float) -> float | int:
    """A whole number as such: what is drawn in whole steps may be a rank."""
    return int(value) if value == int(value) else value


def dimensions(space: Mapping[str, Any]) -> list[Dimension]:
    """The dimensions of a space that keeps the rules (`check_space`)."""
    found = []
    for key, said in space.items():
        if key == PAIRED:
            lists = _paired_lists(said)
            for number, entries in enumerate(lists):
                name = PAIRED if len(lists) == 1 else f"{PAIRED}.{number}"
                found.append(Dimension(name, PAIRED, tuple(entries)))
        else:
            ((kind, values),) = said.items()
            found.append(Dimension(key, kind, tuple(values)))
    return found


def size_of(space: Sequence[Dimension]) -> int | None:
    """How many combinations a space has; None where there is no end of them."""
    counts = [each.count for each in space]
    return None if None in counts else math.prod(count or 0 for count in counts)


def combinations(space: Sequence[Dimension]) -> Iterator[Parameters]:
    """Combinations by which a space is tried: all of the witnesses where they are few, else each witness once
    beside the first of the others, and some drawn."""
    witnesses = [each.witnesses() for each in space]
    if math.prod(map(len, witnesses)) <= _MOST_COMBINATIONS:
        chosen: Iterator[tuple[Any, ...]] = itertools.product(*witnesses)
    else:
        chosen = itertools.chain(_one_at_a_time(witnesses), _drawn(witnesses))
    for values in chosen:
        yield merged(space, values)


def merged(space: Sequence[Dimension], values: Sequence[Any]) -> Parameters:
    """All keys that one value of each dimension sets."""
    found: Parameters = {}
    for each, value in zip(space, values, strict=True):
        found |= each.parameters(value)
    return found


def _one_at_a_time(witnesses: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    first = [each[0] for each in witnesses]
    for place, values in enumerate(witnesses):
        for value in values:
            yield (*first[:place], value, *first[place + 1 :])


def _drawn(witnesses: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    dice = random.Random(0)
    for _ in range(_DRAWN):
        yield tuple(dice.choice(values) for values in witnesses)


def flatten_space(tree: Tree) -> None:
    """Keys of a space that were written as nested mappings, as `--set sweep.space.adapter.r=...` does, become dotted
    ones, in place."""
    space = tree.get(SPACE)
    if not isinstance(space, dict):
        return
    for key in list(space):
        if key != PAIRED and _is_nested(space[key]):
            places = tree.places_under((*SPACE, key))
            value, _ = tree.take((*SPACE, key))
            for way, inner in _leaves(value):
                below = {rest[len(way) :]: place for rest, place in places.items() if rest[: len(way)] == way}
                nearest = below or {(): places[()]}
                tree.put((*SPACE, ".".join((key, *way))), inner, nearest)


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(each, dict) for each in value.values())


def _leaves(value: dict[str, Any], way: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, inner in value.items():
        if _is_nested(inner):
            yield from _leaves(inner, (*way, key))
        else:
            yield (*way, key), inner


def places_of(space: Mapping[str, Any], section: str, key: str) -> Iterator[tuple[Any, str | int]]:
    """Where a space holds values of `SECTION.KEY`, as (owner, name): in its own list, among paired ones, or within the
    whole section."""
    dotted = f"{section}.{key}"
    for name, said in space.items():
        if name == PAIRED:
            for each in itertools.chain.from_iterable(_paired_lists(said)):
                yield from (*_within(each, dotted), *_within(each.get(section), key))
            continue
        values = next(iter(said.values()))
        if name == dotted:
            yield from ((values, number) for number in range(len(values)))
        elif name == section:
            for value in values:
                yield from _within(value, key)


def _within(section: Any, key: str) -> Iterator[tuple[Any, str]]:
    if isinstance(section, dict) and section.get(key) is not None:
        yield section, key


def check_space(space: Any) -> list[Problem]:
    """What breaks the form of a space."""
    if not isinstance(space, dict):
        return [Problem(SPACE, f"{show(space)} is not a mapping of keys to what they are drawn from.", _FORM)]
    if not space:
        return [Problem(SPACE, "is empty: every trial would be the same.", _FORM)]
    problems = []
    seen: dict[str, str] = {}
    for key, said in space.items():
        path = (*SPACE, key)
        found = list(_check_paired(path, said) if key == PAIRED else _check_distribution(path, key, said))
        problems += found
        for each in () if found else dimensions({key: said}):
            for inner in each.keys:
                if inner in seen:
                    problems.append(
                        Problem(path, f"{inner} is drawn by {seen[inner]} already.", "Keep one of the two.")
                    )
                seen[inner] = each.name
    return problems


def _check_distribution(path: Path, key: str, said: Any) -> Iterator[Problem]:
    if isinstance(said, list):
        yield Problem(path, "is a list.", f"Write {key}: {{choice: [...]}}.")
        return
    if not isinstance(said, dict):
        yield Problem(path, f"{show(said)} says nothing to draw from.", _FORM)
        return
    if len(said) != 1:
        names = f"several: {', '.join(said)}" if said else "none"
        yield Problem(path, f"needs exactly one distribution and has {names}.", _FORM)
        return
    ((kind, values),) = said.items()
    known = [*LISTS, *RANGES]
    if kind not in known:
        near = closest(str(kind), known)
        hint = f"Closest: '{near[0]}'." if near else f"There are: {', '.join(known)}."
        yield Problem((*path, kind), "is not a distribution.", hint)
    elif kind in LISTS:
        if not isinstance(values, list) or not values:
            yield Problem(
                (*path, kind), "is not a list with something in it.", f"Write {{{kind}: [8, 16, 32]}}."
            )
        elif None in values:
            yield Problem((*path, kind), "holds an empty value.", "Write a value, or leave it out.")
        else:
            yield from _check_twice((*path, kind), values)
    else:
        yield from _check_range((*path, kind), kind, values)


def _check_range(path: Path, kind: str, values: Any) -> Iterator[Problem]:
    size = RANGES[kind]
    form = "[low, high, step]" if size == 3 else "[low, high]"
    is_numbers = isinstance(values, list) and all(
        isinstance(each, (int, float)) and not isinstance(each, bool) and math.isfinite(each)
        for each in values
    )
    if not is_numbers or len(values) != size:
        yield Problem(path, f"is not {form}, {size} numbers.", f"Write {{{kind}: {form}}}.")
        return
    low, high = values[:2]
    if low >= high:
        yield Problem(path, f"{low} to {high} is empty: the first is not below the second.", f"Write {form}.")
    elif kind == "loguniform" and low <= 0:
        yield Problem(path, f"begins at {low}; a logarithm needs a beginning above 0.", "Or write uniform.")
    elif kind == "randint" and any(each != int(each) for each in values):
        yield Problem(path, "draws whole numbers, between whole numbers.", "Or write uniform.")
    elif kind == "quniform" and values[2] <= 0:
        yield Problem(path, f"a step of {values[2]} leads nowhere.", "Write one above 0.")
    elif kind == "quniform" and values[2] > high - low:
        yield Problem(
            path, f"a step of {values[2]} does not fit between {low} and {high}.", "Write a smaller one."
        )
    elif kind == "quniform" and (
        uneven := [each for each in (low, high) if not _is_multiple(each, values[2])]
    ):
        step = values[2]
        ends = [whole(round(math.floor(each / step + 1e-9) * step, 12)) for each in (low, high)]
        yield Problem(
            path,
            f"draws multiples of {step}, and {uneven[0]} is none.",
            f"Write such as {{quniform: [{ends[0]}, {ends[1]}, {step}]}}.",
        )


def _is_multiple(value: float, step: float) -> bool:
    return math.isclose(value / step, round(value / step))


def _check_twice(path: Path, values: Sequence[Any]) -> Iterator[Problem]:
    """What stands in a list more than once would be tried more than once."""
    seen: set[str] = set()
    for value in values:
        said = json.dumps(_one_number(value), sort_keys=True, default=str)
        if said in seen:
            yield Problem(path, f"holds {show(value)} twice: the same trial would run twice.", "Remove one.")
            return
        seen.add(said)


def _one_number(value: Any) -> Any:
    """A value in which 4.0 is 4."""
    if isinstance(value, float):
        return whole(value) if math.isfinite(value) else value
    if isinstance(value, dict):
        return {key: _one_number(inner) for key, inner in value.items()}
    return [_one_number(each) for each in value] if isinstance(value, list) else value


def _check_paired(path: Path, said: Any) -> Iterator[Problem]:
    form = "Write paired: [{KEY: VALUE, KEY: VALUE}, {KEY: VALUE, KEY: VALUE}]."
    if not isinstance(said, list) or not said:
        yield Problem(path, "is not a list of mappings.", form)
        return
    for entries in _paired_lists(said):
        if not isinstance(entries, list) or not entries:
            yield Problem(path, "holds a list with nothing in it.", form)
        elif not all(isinstance(each, dict) and each for each in entries):
            yield Problem(path, "holds something that is not a mapping of keys to values.", form)
        elif len({frozenset(each) for each in entries}) > 1:
            keys = sorted({key for each in entries for key in each})
            yield Problem(path, "its mappings set different keys.", f"Set all of {', '.join(keys)} in each.")
        else:
            yield from _check_twice(path, entries)


def _paired_lists(said: Any) -> list[Any]:
    """One list of mappings, or several such lists."""
    return list(said) if said and all(isinstance(each, list) for each in said) else [said]
