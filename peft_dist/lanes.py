"""Low-rank additions of many adapters at one layer, side by side: y += s B A x for each position's own adapter.

A lane is the place of one adapter among those that serve now. What stands in it was put there when the adapter
came, and is read by every batch as it is. Ranks are rounded up to a class and filled with zeros, which add
nothing. How they are added: `lane_products.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peft_dist.packed_rows import Interned

# Columns that all lanes of a layer have together at most: beyond, the mask wastes more than it saves.
MOST_COLUMNS = 256
# Lanes that may stand empty before those that serve close up.
_SLACK = 16

Pair = tuple[Tensor, Tensor, float]
Where = Interned
"""For each stretch of a run the lanes that serve it, each with its weight: ((lane, weight), ...)."""


def rank_class(rank: int) -> int:
    """The rank of the lanes that an adapter of this rank stands in."""
    return 1 << max(2, (rank - 1).bit_length())


def suits(rank: int, num_adapters: int) -> bool:
    """Whether so many adapters of this rank are few enough for lanes, and not each to be served by itself."""
    return num_adapters <= max(1, MOST_COLUMNS // rank)


class Lanes:
    """The lanes of one layer and one class of ranks.

    Attributes:
        A: (lanes, rank, in). B: (lanes, rank, out), the scale in it. sizes: (in, out, rank).
        lane_of: adapter -> its lane.
        siblings: those of layers that take the same input, this one among them; None where it is alone.
        order: another object once a lane has another owner.
    """

    def __init__(self, rank: int, in_: int, out: int, like: Tensor) -> None:
        self.rank, self.sizes = rank, (in_, out, rank)
        self.A, self.B = like.new_zeros(0, rank, in_), like.new_zeros(0, rank, out)
        self.lane_of: dict[str, int] = {}
        self.siblings: SiblingLanes | None = None
        self.order = object()

    @property
    def num_bytes(self) -> int:
        """What the lanes take."""
        return self.A.nbytes + self.B.nbytes

    def place(self, adapters: Sequence[str], pair_of: Callable[[str], Pair]) -> None:
        """Sees to it that these adapters, which serve together, have lanes: one that has none takes that of an
        adapter that does not serve now. `pair_of` gives an adapter's A (r, in), B (out, r) and s."""
        missing = [name for name in adapters if name not in self.lane_of]
        if not missing and len(self.A) <= max(_SLACK, 4 * len(adapters)):
            return
        self.order = object()
        if len(self.A) > max(_SLACK, 4 * len(adapters)):
            self._close_up(adapters)
        taken = {self.lane_of[name] for name in adapters if name in self.lane_of}
        free = [lane for lane in range(len(self.A)) if lane not in taken]
        if len(missing) > len(free):
            free += range(len(self.A), len(self.A) + len(missing) - len(free))
            self._grow(free[-1] + 1)
        owner_of = {lane: name for name, lane in self.lane_of.items()}
        # Empty ones first.
        free.sort(key=lambda lane: lane in owner_of)
        for name, lane in zip(missing, free, strict=False):
            self.lane_of.pop(owner_of.get(lane, ""), None)
            self._put(lane, *pair_of(name))
            self.lane_of[name] = lane

    def leave(self, adapter: str) -> None:
        """Frees the lane of an adapter, where it has one."""
        self.lane_of.pop(adapter, None)

    def _put(self, lane: int, A: Tensor, B: Tensor, scale: float) -> None:
        r = A.shape[0]
        a, b = self.A[lane], self.B[lane]
        a[:r], b[:r] = A, B.mT * scale
        if r < self.rank:
            a[r:], b[r:] = 0, 0

    def _grow(self, num: int) -> None:
        self._part()
        more = num - len(self.A)
        self.A = torch.cat([self.A, self.A.new_zeros(more, *self.A.shape[1:])])
        self.B = torch.cat([self.B, self.B.new_zeros(more, *self.B.shape[1:])])

    def _close_up(self, adapters: Sequence[str]) -> None:
        """Lets go of lanes of adapters that do not serve now: every batch reads all lanes."""
        self._part()
        kept = [name for name in adapters if name in self.lane_of]
        lanes = [self.lane_of[name] for name in kept]
        self.A, self.B = self.A[lanes], self.B[lanes]
        self.lane_of = {name: lane for lane, name in enumerate(kept)}

    def _part(self) -> None:
        if self.siblings is not None:
            self.siblings.part()


class SiblingLanes:
    """Lanes of layers that take the same input, whose A stand in one array: one product for all of them."""

    def __init__(self, members: Sequence[Lanes]) -> None:
        self.members = list(members)
        self.A = torch.stack([lanes.A for lanes in members])
        for number, lanes in enumerate(members):
            lanes.A, lanes.siblings = self.A[number], self

    def part(self) -> None:
        """Gives each member an array of its own again."""
        for lanes in self.members:
            lanes.A, lanes.siblings = lanes.A.clone(), None


def join(first: Lanes, second: Lanes) -> None:
    """Lets the lanes of two layers that take one input share a product, where they are alike."""
    if first is second or first.A.shape != second.A.shape or second.siblings is not None:
        return
    members = [first] if first.siblings is None else list(first.siblings.members)
    SiblingLanes([*members, second])
