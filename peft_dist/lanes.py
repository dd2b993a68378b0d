"""Low-rank additions of many adapters at one layer, side by side: y += s B A x for each position's own adapter.

A lane is the place of one adapter among those that serve now. What stands in it was put there when the adapter
came, and is read by every batch as it is. Ranks are rounded up to a class and filled with zeros, which add
nothing.

Which formulation is cheapest, was measured (one CPU thread, ranks 8 and 16): half precision has a fixed price for
each product, so all lanes go in two of them, and a mask takes out what is not a position's own; single precision
pays for what it multiplies, so each adapter's positions are padded to the longest and go in two batched products;
where adapters have many positions each, each goes by itself. On a GPU the products are grouped.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_dist.packed_rows import Run

# Columns that all lanes of a layer have together at most: beyond, the mask wastes more than it saves.
_COLUMNS = 256
# Positions of a row up to which batched products pay in single precision.
_FEW = 64

Pair = tuple[Tensor, Tensor, float]
Where = tuple[tuple[tuple[int, float], ...], ...]
"""For each stretch of a run the lanes that serve it, each with its weight."""


def rank_class(rank: int) -> int:
    """The rank of the lanes that an adapter of this rank stands in."""
    return 1 << max(2, (rank - 1).bit_length())


class Lanes:
    """The lanes of one layer and one class of ranks.

    Attributes:
        A: (lanes, rank, in). B: (lanes, rank, out), the scale in it.
    """

    def __init__(self, rank: int, in_: int, out: int, like: Tensor) -> None:
        self.rank = rank
        self.A, self.B = like.new_zeros(0, rank, in_), like.new_zeros(0, rank, out)
        self._owners: list[Hashable] = []

    @property
    def most(self) -> int:
        """How many adapters may serve at once here."""
        return max(1, _COLUMNS // self.rank)

    def place(self, pairs: dict[Hashable, Callable[[], Pair]]) -> dict[Hashable, int]:
        """The lane of each of these adapters, which serve together; those that have none yet take one of an adapter
        that does not serve now. At most `most` of them."""
        if 2 * len(pairs) < len(self._owners):
            self._close_up(list(pairs))
        have = {owner: lane for lane, owner in enumerate(self._owners) if owner in pairs}
        free = [lane for lane in range(len(self._owners)) if lane not in have.values()]
        missing = [key for key in pairs if key not in have]
        self._grow(len(missing) - len(free))
        free = [lane for lane in range(len(self._owners)) if lane not in have.values()]
        for key, lane in zip(missing, free, strict=False):
            self._put(lane, *pairs[key]())
            self._owners[lane], have[key] = key, lane
        return have

    def leave(self, owner: Hashable) -> None:
        """Frees the lane of an adapter, where it has one."""
        self._owners = [None if one == owner else one for one in self._owners]

    @property
    def is_empty(self) -> bool:
        """Whether no adapter has a lane."""
        return not any(owner is not None for owner in self._owners)

    @property
    def num_bytes(self) -> int:
        """What the lanes take."""
        return self.A.nbytes + self.B.nbytes

    def _put(self, lane: int, A: Tensor, B: Tensor, scale: float) -> None:
        r = A.shape[0]
        a, b = self.A[lane], self.B[lane]
        a[:r], b[:r] = A, B.mT * scale
        if r < self.rank:
            a[r:], b[r:] = 0, 0

    def _grow(self, more: int) -> None:
        if more > 0:
            self.A = torch.cat([self.A, self.A.new_zeros(more, *self.A.shape[1:])])
            self.B = torch.cat([self.B, self.B.new_zeros(more, *self.B.shape[1:])])
            self._owners += [None] * more

    def _close_up(self, keys: Sequence[Hashable]) -> None:
        """Lets go of lanes of adapters that do not serve now: every batch reads all lanes."""
        kept = [lane for lane, owner in enumerate(self._owners) if owner in keys]
        self.A, self.B = self.A[kept], self.B[kept]
        self._owners = [self._owners[lane] for lane in kept]


def suits(rank: int, num_adapters: int) -> bool:
    """Whether so many adapters of this rank are few enough for lanes, and not each to be served by itself."""
    return num_adapters <= max(1, _COLUMNS // rank)


def is_few(num_positions: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a row of so many positions is cheaper from lanes."""
    return device.type != "cpu" or dtype != torch.float32 or num_positions <= _FEW


def add(lanes: Lanes, where: Where, run: Run, x: Tensor, y: Tensor) -> None:
    """Adds to y (T, out), in place, what each position's lanes make of x (T, in)."""
    single = all(len(each) < 2 for each in where)
    if single and x.dtype == torch.float32 and x.device.type == "cpu":
        _batched(lanes, where, run, x, y)
    elif single and x.device.type == "cuda" and x.dtype == torch.bfloat16 and run.num > _FEW:
        _grouped(lanes, where, run, x, y)
    else:
        _masked(lanes, where, run, x, y)


def _masked(lanes: Lanes, where: Where, run: Run, x: Tensor, y: Tensor) -> None:
    """Two products over all lanes; a mask between them leaves each position its own."""
    num, rank, _ = lanes.A.shape
    key = ("mask", where, num, rank, x.dtype)
    mask = run.made.get(key)
    if mask is None:
        mask = torch.zeros(run.num, num, rank, dtype=x.dtype)
        for stretch, served in zip(run.stretches, where, strict=True):
            for lane, weight in served:
                mask[stretch.start : stretch.stop, lane] = weight
        mask = run.made[key] = mask.flatten(1).to(x.device)
    h = F.linear(x, lanes.A.flatten(0, 1)).mul_(mask)
    torch.addmm(y, h, lanes.B.flatten(0, 1), out=y)


def _batched(lanes: Lanes, where: Where, run: Run, x: Tensor, y: Tensor) -> None:
    """Each lane's positions padded to the longest: two batched products."""
    num = len(lanes.A)
    key = ("padded", where, num)
    made = run.made.get(key)
    if made is None:
        made = run.made[key] = _padding(where, run, num, x.device)
    taken, longest, positions, places, weights = made
    h = torch.bmm(x.index_select(0, taken).view(num, longest, -1), lanes.A.mT)
    added = torch.bmm(h, lanes.B).flatten(0, 1).index_select(0, places)
    if weights is not None:
        added *= weights
    y.index_add_(0, positions, added)


def _padding(where: Where, run: Run, num: int, device: torch.device) -> tuple:
    """(the position that each padded place reads, places of a lane, the positions that are served, the place of
    each, its weight or None where all are 1)."""
    own: list[list[int]] = [[] for _ in range(num)]
    weight = {}
    for stretch, served in zip(run.stretches, where, strict=True):
        for lane, w in served:
            own[lane] += range(stretch.start, stretch.stop)
            weight.update(dict.fromkeys(range(stretch.start, stretch.stop), w))
    longest = max(map(len, own))
    taken = [p for positions in own for p in positions + [0] * (longest - len(positions))]
    places = {p: lane * longest + i for lane, positions in enumerate(own) for i, p in enumerate(positions)}
    positions = sorted(places)
    weights = None
    if any(w != 1 for w in weight.values()):
        weights = torch.tensor([[weight[p]] for p in positions], device=device)
    return (
        torch.tensor(taken, device=device),
        longest,
        torch.tensor(positions, device=device),
        torch.tensor([places[p] for p in positions], device=device),
        weights,
    )


def _grouped(lanes: Lanes, where: Where, run: Run, x: Tensor, y: Tensor) -> None:
    """Positions in the order of their lanes: two grouped products."""
    key = ("grouped", where, len(lanes.A))
    made = run.made.get(key)
    if made is None:
        made = run.made[key] = _groups(where, run, len(lanes.A), x.device)
    positions, ends, weights = made
    h = F.grouped_mm(x.index_select(0, positions), lanes.A.mT, offs=ends)
    added = F.grouped_mm(h, lanes.B, offs=ends)
    if weights is not None:
        added *= weights.to(added.dtype)
    y.index_add_(0, positions, added)


def _groups(where: Where, run: Run, num: int, device: torch.device) -> tuple:
    own: list[list[tuple[int, float]]] = [[] for _ in range(num)]
    for stretch, served in zip(run.stretches, where, strict=True):
        for lane, w in served:
            own[lane] += [(p, w) for p in range(stretch.start, stretch.stop)]
    flat = [each for positions in own for each in positions]
    ends = torch.tensor([len(positions) for positions in own]).cumsum(0).to(device, torch.int32)
    weights = None
    if any(w != 1 for _, w in flat):
        weights = torch.tensor([[w] for _, w in flat], device=device)
    return torch.tensor([p for p, _ in flat], device=device), ends, weights
