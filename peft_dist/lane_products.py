"""What lanes add to a row: y += s B A x for each position's own adapters.

Which formulation is cheapest, was measured (one CPU thread, ranks 8 and 16). The few positions of a decoding step go
through a compiled loop, since a library's product has a fixed price that is most of what so small a one costs. Where
there are more, or no compiler, half precision pays that price least often: all lanes go in two products, and a mask
takes out what is not a position's own; layers that take one input, as a block's query, key and value do, share the
first of the two. Single precision pays for what it multiplies, so each adapter's positions are padded to the longest
and go in two batched products; where adapters have many positions each, each goes by itself. On a GPU the products of
long rows are grouped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_dist.compiled import lane_loop
from peft_dist.lanes import MOST_COLUMNS, Lanes, Where
from peft_dist.packed_rows import Run

# Positions of a row up to which batched products pay in single precision.
_FEW = 64
# Positions of one adapter up to which the loop is cheaper than two products of its own.
_FEW_OF_ONE = 32


def fewest(num_positions: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """How many adapters of a row there must be for lanes to be cheaper than each by itself; None where they never
    are."""
    loops = lane_loop.suits(num_positions, dtype, device)
    if loops and num_positions <= _FEW_OF_ONE:
        return 1
    is_few = device.type != "cpu" or dtype != torch.float32 or num_positions <= _FEW
    return 2 if loops or is_few else None


def add(lanes: Lanes, where: Where, run: Run, x: Tensor, y: Tensor) -> None:
    """Adds to y (..., out), in place, what each position's lanes make of x (..., in)."""
    key = where, lanes.rank, x.dtype
    way = run.made.get(key)
    if way is None:
        way = run.made[key] = _way(lanes, where, run, x)
    way(lanes, where, run, x, y.view(-1, y.shape[-1]))


def _way(
    lanes: Lanes, where: Where, run: Run, x: Tensor
) -> Callable[[Lanes, Where, Run, Tensor, Tensor], None]:
    """The formulation for this row."""
    most = max(map(len, where.values))
    if most * lanes.rank <= MOST_COLUMNS and lane_loop.suits(run.num, x.dtype, x.device):
        spans = [(stretch.start, stretch.stop) for stretch in run.stretches]
        return functools.partial(_looped, lane_loop.Served(spans, where.values))
    if most > 1:
        return _masked
    if x.dtype == torch.float32 and x.device.type == "cpu":
        return _batched
    if x.device.type == "cuda" and x.dtype == torch.bfloat16 and run.num > _FEW:
        return _grouped
    return _masked


def _looped(served: lane_loop.Served, lanes: Lanes, where: Where, run: Run, x: Tensor, y: Tensor) -> None:
    """Each position by its own lanes alone."""
    if x.is_contiguous() and y.is_contiguous() and y.dtype == x.dtype:
        lane_loop.add(lanes.A, lanes.B, lanes.sizes, served, x, y)
    else:
        _masked(lanes, where, run, x, y)


def _masked(lanes: Lanes, where: Where, run: Run, x: Tensor, y: Tensor) -> None:
    """Two products over all lanes; a mask between them leaves each position its own."""
    siblings = lanes.siblings
    if siblings is None:
        h = F.linear(x.reshape(-1, x.shape[-1]), lanes.A.flatten(0, 1)).mul_(_mask(lanes, where, run, x))
    else:
        x_then, where_then, each = run.made.get(siblings, (None, None, None))
        if x_then is not x or where_then is not where:
            product = F.linear(x.reshape(-1, x.shape[-1]), siblings.A.flatten(0, 2))
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
    h = F.grouped_mm(x.flatten(0, -2).index_select(0, positions), lanes.A.mT, offs=ends)
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
