"""Which rows of a global batch share a sequence: a function of their lengths and the number of ranks alone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence


def balanced(lengths: Sequence[int], capacity: int, world_size: int) -> list[list[int]]:
    """The rows' indices as bins of at most `capacity` tokens, equally many for each rank, as few as fit so; the
    tokens of the fullest are as few as a longest-first deal makes them. A bin may be empty.

    Rows longer than the capacity stand alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    count = world_size * max(1, math.ceil(sum(lengths) / (capacity * world_size)))
    while (bins := _dealt(order, lengths, capacity, count)) is None:
        count += world_size
    return [sorted(rows) for rows in bins]


def _dealt(order: Sequence[int], lengths: Sequence[int], capacity: int, count: int) -> list[list[int]] | None:
    """Each row, longest first, into the emptiest bin; None where one does not fit."""
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [(0, number) for number in range(count)]
    for row in order:
        filled, number = heapq.heappop(room)
        if bins[number] and filled + lengths[row] > capacity:
            return None
        bins[number].append(row)
        heapq.heappush(room, (filled + lengths[row], number))
    return bins


def in_order(lengths: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """The rows' indices as bins of at most `capacity` tokens, neighbours together."""
    rows: list[int] = []
    filled = 0
    for row, length in enumerate(lengths):
        if rows and filled + length > capacity:
            yield rows
            rows, filled = [], 0
        rows.append(row)
        filled += length
    if rows:
        yield rows
