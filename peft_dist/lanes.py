"""Low-rank additions of many adapters at one layer, side by side: y += s B A x for each position's own adapter.

A lane is the place of one adapter among those that serve now. What stands in it was put there when the adapter
came, and is read by every batch as it is. Ranks are rounded up to a class and filled with zeros, which add
nothing.

Which formulation is cheapest, was measured (one CPU thread, ranks 8 and 16): half precision has a fixed price for
each product, so all lanes go in two of them, and a mask takes out what is not a position's own; layers that take one
input, as a block's query, key and value do, share the first of the two. Single precision pays for what it
multiplies, so each adapter's positions are padded to the longest and go in two batched products; where adapters have
many positions each, each goes by itself. On a GPU the products of long rows are grouped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_dist.packed_rows import Interned, Run

# Columns that all lanes of a layer have together at most: beyond, the mask wastes more than it saves.
_COLUMNS = 256
# Positions of a row up to which batched products pay in single precision.
_FEW = 64
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
    return num_adapters <= max(1, _COLUMNS // rank)


def is_few(num_positions: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a row of so many positions is cheaper from lanes."""
    return device.type != "cpu" or dtype != torch.float32 or num_positions <= _FEW


class Lanes:
    """The lanes of one layer and one class of ranks.

    Attributes:
        A: (lanes, rank, in). B: (lanes, rank, out), the scale in it. lane_of: adapter -> its lane.
        siblings: those of layers that take the same input, this one among them; None where it is alone.
        order: another object once a lane has another owner.
    """

    def __init__(self, rank: int, in_: int, out: int, like: Tensor) -> None:
        self.rank = rank
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


def add(lanes: Lanes, where: Where, run: Run, x: Tensor, y: Tensor) -> None:
    """Adds to y (..., out), in place, what each position's lanes make of x (..., in)."""
    flat = y.view(-1, y.shape[-1])
    single = run.made.get(where)
    if single is None:
        single = run.made[where] = all(len(each) < 2 for each in where.values)
    if single and x.dtype == torch.float32 and x.device.type == "cpu":
        _batched(lanes, where, run, x, flat)
    elif single and x.device.type == "cuda" and x.dtype == torch.bfloat16 and run.num > _FEW:
        _grouped(lanes, where, run, x.flatten(0, -2), flat)
    else:
        _masked(lanes, where, run, x, flat)


def _masked(lanes: Lanes, where: Where, run: Run, x: Tensor, y: Tensor) -> None:
    """Two products over all lanes; a mask between them leaves each position its own."""
    siblings = lanes.siblings
    if siblings is None:
        h = F.linear(x.view(-1, x.shape[-1]), lanes.A.flatten(0, 1)).mul_(_mask(lanes, where, run, x))
    else:
        x_then, where_then, each = run.made.get(siblings, (None, None, None))
        if x_then is not x or where_then is not where:
            product = F.linear(x.view(-1, x.shape[-1]), siblings.A.flatten(0, 2))
            product = product.view(run.num, len(siblings.members), -1).transpose(0, 1)
            # Each member's own rows side by side: the second product is much slower over rows that are apart.
            whole = torch.empty(product.shape, dtype=x.dtype, device=x.device)
            torch.mul(product, _mask(lanes, where, run, x), out=whole)
            each = dict(zip(siblings.members, whole.unbind(), strict=True))
            run.made[siblings] = x, where, each
        h = each[lanes]  # type: ignore[index]
    y.addmm_(h, lanes.B.flatten(0, 1))


def _mask(lanes: Lanes, where: Where, run: Run, x: Tensor) -> Tensor:
    """(T, lanes x rank): the weight of each position's own lanes, else 0."""
    num, rank, _ = lanes.A.shape
    key = ("mask", where, num, rank, x.dtype)
    mask = run.made.get(key)
    if mask is None:
        mask = torch.zeros(run.num, num, rank, dtype=x.dtype)
        for stretch, served in zip(run.stretches, where.values, strict=True):
            for lane, weight in served:
                mask[stretch.start : stretch.stop, lane] = weight
        mask = run.made[key] = mask.flatten(1).to(x.device)
    return mask


def _batched(lanes: Lanes, where: Where, run: Run, x: Tensor, y: Tensor) -> None:
    """Each lane's positions padded to the longest: two batched products."""
    num = len(lanes.A)
    key = ("padded", where, num)
    made = run.made.get(key)
    if made is None:
        made = run.made[key] = _padding(where, run, num, x.device)
    taken, longest, positions, places, weights = made
    x_then, key_then, padded = run.made.get("padded", (None, None, None))
    if x_then is not x or key_then != key:
        padded = x.view(-1, x.shape[-1]).index_select(0, taken).view(num, longest, -1)
        run.made["padded"] = x, key, padded
    added = torch.bmm(torch.bmm(padded, lanes.A.mT), lanes.B).flatten(0, 1).index_select(0, places)
    if weights is not None:
        added *= weights
    if positions is None:
        y += added
    else:
        y.index_add_(0, positions, added)


def _padding(where: Where, run: Run, num: int, device: torch.device) -> tuple:
    """(the position that each padded place reads, places of a lane, the positions that are served or None where all
    are, the place of each, its weight or None where all are 1)."""
    own: list[list[int]] = [[] for _ in range(num)]
    weight = {}
    for stretch, served in zip(run.stretches, where.values, strict=True):
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
        None if len(positions) == run.num else torch.tensor(positions, device=device),
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
    for stretch, served in zip(run.stretches, where.values, strict=True):
        for lane, w in served:
            own[lane] += [(p, w) for p in range(stretch.start, stretch.stop)]
    flat = [each for positions in own for each in positions]
    ends = torch.tensor([len(positions) for positions in own]).cumsum(0).to(device, torch.int32)
    weights = None
    if any(w != 1 for _, w in flat):
        weights = torch.tensor([[w] for _, w in flat], device=device)
    return torch.tensor([p for p, _ in flat], device=device), ends, weights
