"""Many sequences in one packed row (1, T), each served by adapters of its own: what serving runs.

T is the sum of the sequences' lengths; they stand side by side in the order in which they are named. Where a
model keeps the last position of some of them alone (before its head), a layer gets one row for each of those.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_dist.errors import RowsError
from peft_dist.rows import BASE, Rows, is_routed

Blend = tuple[tuple[str, float], ...]
"""Adapters whose additions are summed, each with its weight."""

Reads = tuple[tuple[str, int | Tensor], ...]
"""What methods read of one sequence, by name: a whole number, as of its task, or (1, positions, ...) with an entry for
each of its positions in the row."""


@dataclass(frozen=True, eq=False)
class Stretch:
    """Neighbouring positions of a packed row that one choice of adapters serves, reading the same."""

    choice: str | Blend | None
    start: int
    stop: int
    reads: Reads = ()

    def given(self, device: torch.device) -> Mapping[str, Tensor]:
        """`reads` as methods find them in `p`: a whole number as (1,)."""
        return {
            name: value if isinstance(value, Tensor) else torch.tensor([value], device=device)
            for name, value in self.reads
        }


class Run:
    """A packed row as one layer gets it: which stretches of its positions are whose.

    Attributes:
        stretches: in the order of the row. choices: what each of them is served by; one object for equal ones.
        num: positions. made: what was computed for this row once, by whoever computed it.
    """

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        self.stretches = tuple(stretches)
        self.choices = interned(tuple(s.choice for s in self.stretches))
        self.num = self.stretches[-1].stop if self.stretches else 0
        self.made: dict[Hashable, Any] = {}

    def dim(self, t: Tensor) -> int | None:
        """The dimension of t that counts the row's positions; None where it has none."""
        if t.ndim > 1 and t.shape[0] == 1 and t.shape[1] == self.num:
            return 1
        return 0 if t.ndim > 0 and t.shape[0] == self.num else None

    def cut(self, tree: Any, stretch: Stretch) -> Any:
        """`tree` of tuples, lists and dictionaries, tensors in it that have the row's positions cut to a stretch."""
        if isinstance(tree, Tensor):
            dim = self.dim(tree) if tree.ndim > 1 else None
            return tree if dim is None else tree.narrow(dim, stretch.start, stretch.stop - stretch.start)
        if type(tree) is dict:
            return {key: self.cut(part, stretch) for key, part in tree.items()}
        if type(tree) in (tuple, list):
            return type(tree)(self.cut(part, stretch) for part in tree)
        return tree

    def joined(self, parts: Sequence[Any], dim: int) -> Any:
        """The outputs of all stretches, in their order, as the output of one call."""
        first = parts[0]
        if isinstance(first, Tensor):
            return torch.cat(list(parts), dim)
        if isinstance(first, (tuple, list)):
            return type(first)(self.joined(each, dim) for each in zip(*parts, strict=True))
        return first


@dataclass(frozen=True, eq=False)
class PackedRows(Rows):
    """`Rows` of one packed row. `adapters` says one choice for each sequence: a name, `"__base__"`, None for the
    active adapters, or a `Blend`.

    The adapters' tensors stay as they are while packed rows run: what is made of them is kept between calls.

    Args:
        lengths: positions of each sequence in this row.
        starts: the position of each sequence's first one in the whole of it; 0 by default.
        reads: what methods read of each sequence; nothing by default.
        kept: the sequences whose last position alone reaches the head, in order; None where all positions do.
        alone: each sequence's numbers are to be those of a row of its own, bit for bit: nothing is computed
            over adapters together.
    """

    lengths: Sequence[int] = ()
    starts: Sequence[int] = ()
    reads: Sequence[Reads] = ()
    kept: Sequence[int] | None = None
    alone: bool = False
    tokens: Run = field(init=False, repr=False)
    heads: Run = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapters is None or len(self.adapters) != len(self.lengths):
            raise RowsError(
                f"PackedRows: {len(self.adapters or ())} adapters for {len(self.lengths)} lengths. Give one of each "
                "per sequence."
            )
        if not self.starts:
            object.__setattr__(self, "starts", (0,) * len(self.lengths))
        if not self.reads:
            object.__setattr__(self, "reads", ((),) * len(self.lengths))
        joins = not self.alone
        tokens = _stretches(list(zip(self.adapters, self.lengths, self.reads, strict=True)), joins)
        kept = range(len(self.lengths)) if self.kept is None else self.kept
        heads = _stretches([(self.adapters[i], 1, _of_last(self.reads[i])) for i in kept], joins)
        object.__setattr__(self, "tokens", Run(tokens))
        object.__setattr__(self, "heads", Run(heads))

    @property
    def named(self) -> set[str]:
        """Every adapter that serves one of the sequences."""
        names: set[str] = set()
        for choice in self.adapters or ():
            if isinstance(choice, tuple):
                names |= {name for name, _ in choice}
            elif choice is not None and choice != BASE:
                names.add(choice)
        return names

    def run_of(self, site: str, x: Tensor) -> Run:
        """How a layer's input x is divided: (1, T, ...) or (T, ...), or with one position for each kept sequence.

        Raises:
            RowsError: x is none of these; names the layer.
        """
        if is_routed(site):
            if len(self.tokens.stretches) == 1:
                return self._whole(x)
        else:
            for run in (self.tokens, self.heads):
                if run.dim(x) is not None:
                    return run
        raise RowsError(
            f"{site}: its input {tuple(x.shape)} is no packed row of {self.tokens.num} positions, so nothing tells "
            "which adapter serves which part of it. Run one adapter at a time, or leave the layer out."
        )

    def _whole(self, x: Tensor) -> Run:
        """However many positions x has, they are all of the one choice."""
        (only,) = self.tokens.stretches
        return Run([Stretch(only.choice, 0, x.shape[1] if x.shape[0] == 1 else x.shape[0], only.reads)])


class Interned:
    """A tuple that is one object for all equal ones, so that it is compared and hashed by its identity."""

    __slots__ = ("values",)

    def __init__(self, values: tuple) -> None:
        self.values = values


@functools.lru_cache(maxsize=4096)
def interned(values: tuple) -> Interned:
    """The one object that stands for these values."""
    return Interned(values)


def _of_last(reads: Reads) -> Reads:
    """What is read of a sequence's last position alone."""
    return tuple((name, value[:, -1:] if isinstance(value, Tensor) else value) for name, value in reads)


def _stretches(parts: Sequence[tuple[Any, int, Reads]], joins: bool) -> list[Stretch]:
    made: list[Stretch] = []
    for choice, length, reads in parts:
        start = made[-1].stop if made else 0
        if joins and made and (made[-1].choice, made[-1].reads) == (choice, reads):
            made[-1] = Stretch(choice, made[-1].start, start + length, reads)
        elif length:
            made.append(Stretch(choice, start, start + length, reads))
    return made
