"""Several sequences in one row of a batch while a model trains: where each stands, and the way from rows to sequences
and back.

The base keeps them apart by positions that begin anew; what adapters do by position alone runs on the rows as they
are, and what goes by the sequence on sequences that were taken out of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Bins:
    """Sequences side by side in rows (bins, width), padded on the right.

    Args:
        lengths: of each row the positions of its sequences, in order. Sequences are numbered through all rows.
    """

    lengths: tuple[tuple[int, ...], ...]
    num: int = field(init=False)
    """Sequences."""
    width: int = field(init=False)
    longest: int = field(init=False)
    """Positions of the longest sequence."""
    _taken: Tensor = field(init=False, repr=False)
    _put: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        every = [length for row in self.lengths for length in row]
        width, longest = max(map(sum, self.lengths), default=0), max(every, default=0)
        taken = torch.zeros(len(every), longest, dtype=torch.long)
        put = torch.zeros(len(self.lengths), width, dtype=torch.long)
        number = 0
        for row, lengths in enumerate(self.lengths):
            for start, length in zip(itertools.accumulate(lengths, initial=0), lengths, strict=False):
                taken[number, :length] = row * width + start + torch.arange(length)
                put[row, start : start + length] = number * longest + torch.arange(length)
                number += 1
        made = {"num": len(every), "width": width, "longest": longest, "_taken": taken, "_put": put}
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, int]:
        """(bins, width)."""
        return len(self.lengths), self.width

    def positions(self) -> Tensor:
        """int64 (bins, width): each position's place in its sequence; padding counts from 0 too."""
        rows = []
        for lengths in self.lengths:
            padding = self.width - sum(lengths)
            rows.append(torch.cat([torch.arange(n) for n in (*lengths, padding)]))
        return torch.stack(rows)

    def starts(self) -> Tensor:
        """Boolean (bins, width): the first position of each sequence."""
        is_first = torch.zeros(self.shape, dtype=torch.bool)
        for row, lengths in enumerate(self.lengths):
            is_first[row, list(itertools.accumulate(lengths, initial=0))[: len(lengths)]] = True
        return is_first

    def places(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """int64 (bins, width) twice: each position's sequence, and its place in it; padding's are the first's."""
        put = self._on(like, "_put")
        return put // max(1, self.longest), put % max(1, self.longest)

    def apart(self, x: Tensor) -> Tensor:
        """(sequences, longest, ...) of x (bins, width, ...); behind the end of a shorter sequence stands what is
        nobody's."""
        return x.flatten(0, 1)[self._on(x, "_taken")]

    def together(self, y: Tensor) -> Tensor:
        """(bins, width, ...) of y (sequences, longest, ...)."""
        return y.flatten(0, 1)[self._on(y, "_put")]

    def _on(self, like: Tensor, name: str) -> Tensor:
        table: Tensor = getattr(self, name)
        if table.device != like.device:  # once for a batch, not for a layer
            table = table.to(like.device)
            object.__setattr__(self, name, table)
        return table


def bins_of(lengths: Sequence[Sequence[int]]) -> Bins:
    """`Bins` of any sequences of lengths."""
    return Bins(tuple(tuple(row) for row in lengths))
