"""`resources.num_workers`: one number, or `[min, max]` of an elastic job; and which sizes make a step shorter.

An elastic run steps with any number of workers in its range. Its global batch never changes: a size that does not
divide it gives some workers a row less, and one that brings no step nearer its end is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_FORMS = "Write a whole number of at least 1, or [min, max]."


@dataclass(frozen=True)
class GroupSize:
    """A number of workers with which a run can step."""

    num_workers: int
    gradient_accumulation_steps: int
    """Forwards of the busiest worker in one optimizer step."""


def parse_workers(value: object) -> int | tuple[int, int]:
    """A number, or (min, max); a range of one number is that number.

    Raises:
        ValueError: with the forms that are allowed.
    """
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ValueError(f"{list(value)} is not [min, max]: it has {len(value)} entries. {_FORMS}")
        least, most = (_count(each, value) for each in value)
        if least > most:
            raise ValueError(f"[{least}, {most}] has its largest number first. Write [{most}, {least}].")
        return least if least == most else (least, most)
    return _count(value, value)


def _count(value: object, whole: object) -> int:
    shown = list(whole) if isinstance(whole, list | tuple) else whole
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{shown!r} is not a number of workers. {_FORMS}")
    return value


def forwards(global_batch_size: int, micro_batch_size: int, num_workers: int) -> int:
    """Forwards in one step of the worker with most rows."""
    return math.ceil(math.ceil(global_batch_size / num_workers) / micro_batch_size)


def group_sizes(
    least: int, most: int, global_batch_size: int, micro_batch_size: int
) -> tuple[GroupSize, ...]:
    """The sizes from `least` to `most` that are worth their workers, ascending: the least one, and each with which a
    step has fewer forwards than with any smaller one. A single number is itself."""
    found = [GroupSize(least, forwards(global_batch_size, micro_batch_size, least))]
    for count in range(least + 1, most + 1):
        steps = forwards(global_batch_size, micro_batch_size, count)
        if steps < found[-1].gradient_accumulation_steps:
            found.append(GroupSize(count, steps))
    return tuple(found)


def numbers(sizes: Sequence[GroupSize]) -> str:
    """`1, 2 or 4`."""
    *others, last = [str(each.num_workers) for each in sizes]
    return f"{', '.join(others)} or {last}" if others else last
