"""A layer over one packed row whose positions are served by different adapters: the base's product once for all,
low-rank additions side by side, every other adapter on its own stretch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_dist import lane_products, lanes
from peft_dist.adapted.entrance import Entrance, as_given
from peft_dist.adapted.levels import Level, down, up
from peft_dist.contract import ActivationMethod, WeightMethod
from peft_dist.errors import RowsError
from peft_dist.packed_rows import Blend, PackedRows, Run, Stretch, interned
from peft_dist.pauses import pause
from peft_dist.rows import BASE

# A layer's plans that are kept: one for each set of adapters that served of late.
_PLANS = 32


@dataclass(frozen=True)
class Plan:
    """How a layer serves stretches of these choices.

    Attributes:
        side_by_side: lanes, and for each stretch which of them serve it.
        apart: (the stretch's number, the adapters that serve it by themselves, each with its weight).
        turns: whether any of those changes what the layer takes or gives.
        orders: lanes, and how they stood when this was made.
        named: the adapters that the rows name, here or not; None among them where some name the active ones.
    """

    side_by_side: tuple[tuple[lanes.Lanes, lanes.Where], ...]
    apart: tuple[tuple[int, Blend], ...]
    turns: bool
    orders: tuple[tuple[lanes.Lanes, object], ...] = ()
    named: frozenset[str | None] = frozenset()


def run_packed(module: Any, x: Tensor, rows: PackedRows) -> Tensor:
    """What the adapted layer gives for x (1, T, ...), or with one position for each kept sequence."""
    pause()
    run = rows.run_of(module._site_name, x)
    plan = _plan(module, x, run, rows.alone)
    if plan.turns:
        return _turned(module, plan, run, x)
    y = module.base(x)
    if plan.side_by_side or plan.apart:
        _add(module, plan, run, x, y)
    return y


def _turned(module: Any, plan: Plan, run: Run, x: Tensor) -> Tensor:
    """Where adapters change what the layer takes or gives."""
    dim = run.dim(x)
    assert dim is not None
    entrance, taken, turned, additions = Entrance(module), x, [], []
    for number, blend in plan.apart:
        if not isinstance(module.methods[blend[0][0]], ActivationMethod):
            additions.append((number, blend))
            continue
        stretch = run.stretches[number]
        levels = _levels(module, blend, stretch)
        inputs = down(levels, _part(x, dim, stretch))
        turned.append((levels, inputs, stretch))
        taken = taken.clone() if taken is x else taken
        _part(taken, dim, stretch).copy_(as_given(inputs[0], x))
    y = module.base(taken)
    for levels, inputs, stretch in turned:
        out = _part(y, dim, stretch)
        out.copy_(up(levels, inputs, out, entrance))
    _add(module, Plan(plan.side_by_side, tuple(additions), False), run, x, y)
    return y


def _add(module: Any, plan: Plan, run: Run, x: Tensor, y: Tensor) -> None:
    """Adds to y, in place, what adapters add to it."""
    for stacked, where in plan.side_by_side:
        lane_products.add(stacked, where, run, x, y)
    if plan.apart:
        _add_apart(module, plan, run, x, y)


def _add_apart(module: Any, plan: Plan, run: Run, x: Tensor, y: Tensor) -> None:
    """Adds what adapters add that serve their stretches by themselves."""
    dim = run.dim(x)
    assert dim is not None
    entrance = Entrance(module)
    for number, blend in plan.apart:
        stretch = run.stretches[number]
        piece, out = _part(x, dim, stretch), _part(y, dim, stretch)
        for level, (_, weight) in zip(_levels(module, blend, stretch), blend, strict=True):
            method: Any = level.method
            pair = method.low_rank(level.p, level.under) if piece.is_floating_point() else None
            if pair is not None and pair[0].dtype == piece.dtype and out.is_contiguous():
                A, B, scale = pair
                h = piece.flatten(0, -2) @ A.mT
                flat = out.view(-1, out.shape[-1])
                torch.addmm(flat, h, B.mT, alpha=scale * weight, out=flat)
                continue
            added = method.added(level.p, level.under, entrance.of(method, level.p)(piece))
            out += added if weight == 1 else added * weight


def _part(t: Tensor, dim: int, stretch: Stretch) -> Tensor:
    return t.narrow(dim, stretch.start, stretch.stop - stretch.start)


def _levels(module: Any, blend: Blend, stretch: Stretch) -> list[Level]:
    reads = stretch.given(module.base.device) if stretch.reads else None
    return [
        Level(name, module.methods[name], module.given(name, reads=reads), module.base) for name, _ in blend
    ]


def chosen(module: Any, choice: str | Blend | None) -> Blend:
    """The adapters on a module that serve a stretch of this choice, each with its weight.

    Raises:
        RowsError: several would act on one module of which one does not add to its weight.
    """
    if isinstance(choice, tuple):
        here = tuple((name, weight) for name, weight in choice if name in module.methods)
    elif choice == BASE:
        return ()
    else:
        here = tuple((name, 1.0) for name in module.named(choice))
    if module._pool.waiting:
        for name, _ in here:
            module.check_filled(name)
    if len(here) > 1 or any(weight != 1 for _, weight in here):
        for name, _ in here:
            if not isinstance(module.methods[name], WeightMethod):
                raise RowsError(
                    f"{module._site_name}: adapter {name!r} is a {type(module.methods[name]).__name__}, which adds "
                    "nothing that could be weighted and summed. Serve it alone."
                )
    return here


def _plan(module: Any, x: Tensor, run: Run, alone: bool) -> Plan:
    key = run.made.get(x.dtype)
    if key is None:  # once for a row, not for a layer
        fewest = None if alone else lane_products.fewest(run.num, x.dtype, x.device)
        key = run.made[x.dtype] = (run.choices, fewest, x.dtype)
    plans = module._pool.plans.get(module._site_name)
    if plans is None:
        plans = module._pool.plans[module._site_name] = {}
    plan = plans.get(key)
    if plan is not None:
        for stacked, order in plan.orders:
            if stacked.order is not order:
                break
        else:
            return plan
    if len(plans) >= _PLANS:
        plans.clear()
    plan = plans[key] = _made(module, x, run, key[1])
    return plan


def _made(module: Any, x: Tensor, run: Run, fewest: int | None) -> Plan:
    choices = [chosen(module, choice) for choice in run.choices.values]
    names = dict.fromkeys(name for blend in choices for name, _ in blend)
    stacked = _side_by_side(module, x, list(names), fewest) if fewest and x.is_floating_point() else {}
    side_by_side = tuple(
        (
            each,
            interned(
                tuple(
                    tuple((each.lane_of[name], weight) for name, weight in blend if stacked.get(name) is each)
                    for blend in choices
                )
            ),
        )
        for each in dict.fromkeys(stacked.values())
    )
    _join_siblings(x, run, side_by_side)
    apart = tuple(
        (number, rest)
        for number, blend in enumerate(choices)
        if (rest := tuple((name, weight) for name, weight in blend if name not in stacked))
    )
    turns = any(isinstance(module.methods[name], ActivationMethod) for _, blend in apart for name, _ in blend)
    named: set[str | None] = set()
    for choice in run.choices.values:
        named |= {name for name, _ in choice} if isinstance(choice, tuple) else {choice}
    orders = tuple((each, each.order) for each, _ in side_by_side)
    return Plan(side_by_side, apart, turns, orders, frozenset(named))


def _join_siblings(x: Tensor, run: Run, here: tuple[tuple[lanes.Lanes, lanes.Where], ...]) -> None:
    """Lets this layer's lanes share a product with those of the layer that took the same x just before."""
    before = run.made.get("before")
    run.made["before"] = x, here
    if before is not None and before[0] is x and len(here) == len(before[1]) == 1:
        (first, where), (second, own) = before[1][0], here[0]
        if where is own:
            lanes.join(first, second)


def _side_by_side(module: Any, x: Tensor, names: Sequence[str], fewest: int) -> dict[str, lanes.Lanes]:
    """The adapters that are served from lanes, by name: where there are so many of a rank."""
    if module.base.site.kind != "linear":
        return {}
    kinds = module._pool.kinds.setdefault(module._site_name, {})
    ranked: dict[int, list[str]] = {}
    for name in names:
        rank = kinds.get(name)
        if rank is None:
            rank = kinds[name] = _rank_of(module, name)
        if rank:
            ranked.setdefault(rank, []).append(name)
    made = {}
    for rank, here in ranked.items():
        if len(here) >= fewest and lanes.suits(rank, len(here)):
            own = module._pool.lanes_at(module._site_name, rank, module.base.shape, x)
            own.place(here, lambda name: module.methods[name].low_rank(module.given(name), module.base))
            made.update(dict.fromkeys(here, own))
    return made


def _rank_of(module: Any, name: str) -> int:
    """The class of the adapter's rank here, 0 where it is of no rank that lanes have."""
    method = module.methods[name]
    if not isinstance(method, WeightMethod) or method.reads:
        return 0
    pair = method.low_rank(module.given(name), module.base)
    return 0 if pair is None else lanes.rank_class(pair[0].shape[0])
