"""Which rows are held out, and how often the others are seen: functions of the rows' content hashes alone, so
that a row stays where it is when rows are added, moved or repeated."""

from __future__ import annotations

from collections.abc import Iterable


def held_out(row_hashes: Iterable[str], val_set_size: float) -> set[str]:
    """The hashes of the rows that are held out.

    A `val_set_size` below 1 is a share: a row is held out when its hash, read as a number in [0, 1), is less.
    Where that takes no row of several, the one with the smallest hash is taken, so that there is something to
    evaluate on. From 1 on it is a number of rows: those with the smallest hashes, each counted once.
    """
    distinct = sorted(set(row_hashes))
    if val_set_size >= 1:
        return set(distinct[: int(val_set_size)])
    taken = {row_hash for row_hash in distinct if place(row_hash) < val_set_size}
    if not taken and val_set_size > 0 and len(distinct) > 1:
        return {distinct[0]}
    return taken


def repeats(row_hash: str, weight: float) -> int:
    """How often a training row of a dataset with this `weight` is taken: 2.5 is twice for half of the rows,
    three times for the others."""
    whole = int(weight)
    return whole + (place(row_hash[16:]) < weight - whole)


def place(row_hash: str) -> float:
    """The first 52 bits of a hexadecimal hash as a number in [0, 1)."""
    return int(row_hash[:13], 16) / 2**52
