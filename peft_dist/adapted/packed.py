"""A layer over one packed row whose positions are served by different adapters: the base's product once for all,
low-rank additions side by side, every other adapter on its own stretch.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_dist import lanes
from peft_dist.adapted.entrance import Entrance, as_given
from peft_dist.adapted.levels import Level, down, up
from peft_dist.contract import ActivationMethod, WeightMethod
from peft_dist.errors import RowsError
from peft_dist.packed_rows import Blend, PackedRows, Run, Stretch
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
    """

    side_by_side: tuple[tuple[lanes.Lanes, lanes.Where], ...]
    apart: tuple[tuple[int, Blend], ...]
    turns: bool


def run_packed(module: Any, x: Tensor, rows: PackedRows) -> Tensor:
    """What the adapted layer gives for x (1, T, ...), or with one position for each kept sequence."""
    run = rows.run_of(module.base.site.name, x)
    plan = _plan(module, x, run, rows.alone)
    if not plan.turns:
        y = module.base(x)
        if not plan.side_by_side and not plan.apart:
            return y
        return _with_additions(module, plan, run, x, y)
    dim = run.dim(x)
    assert dim is not None
    entrance, taken, levels = Entrance(module), x, {}
    for number, blend in plan.apart:
        here = levels[number] = _levels(module, blend)
        if isinstance(here[0].method, ActivationMethod):
            taken = taken.clone() if taken is x else taken
            piece = _part(x, dim, run.stretches[number])
            _part(taken, dim, run.stretches[number]).copy_(as_given(down(here, piece)[0], x))
    y = module.base(taken)
    for number, here in levels.items():
        if isinstance(here[0].method, ActivationMethod):
            stretch = run.stretches[number]
            out = _part(y, dim, stretch)
            out.copy_(up(here, down(here, _part(x, dim, stretch)), out, entrance))
    additions = tuple(
        (number, blend)
        for number, blend in plan.apart
        if not isinstance(levels[number][0].method, ActivationMethod)
    )
    return _with_additions(module, Plan(plan.side_by_side, additions, False), run, x, y)


def _with_additions(module: Any, plan: Plan, run: Run, x: Tensor, y: Tensor) -> Tensor:
    """y with what adapters add to it, in place."""
    for stacked, where in plan.side_by_side:
        lanes.add(stacked, where, run, x.flatten(0, -2), y.flatten(0, -2))
    dim = run.dim(x)
    assert dim is not None
    entrance = Entrance(module)
    for number, blend in plan.apart:
        stretch = run.stretches[number]
        piece, out = _part(x, dim, stretch), _part(y, dim, stretch)
        for level, (_, weight) in zip(_levels(module, blend), blend, strict=True):
            method: Any = level.method
            pair = method.low_rank(level.p, level.under) if piece.is_floating_point() else None
            if pair is not None and pair[0].dtype == piece.dtype and out.is_contiguous():
                A, B, scale = pair
                h = piece.flatten(0, -2) @ A.mT
                torch.addmm(flat := out.view(-1, out.shape[-1]), h, B.mT, alpha=scale * weight, out=flat)
                continue
            added = method.added(level.p, level.under, entrance.of(method, level.p)(piece))
            out += added if weight == 1 else added * weight
    return y


def _part(t: Tensor, dim: int, stretch: Stretch) -> Tensor:
    return t.narrow(dim, stretch.start, stretch.stop - stretch.start)


def _levels(module: Any, blend: Blend) -> list[Level]:
    return [Level(name, module.methods[name], module.given(name), module.base) for name, _ in blend]


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
    plans: dict = module.__dict__.setdefault("_plans", {})
    pool = module._pool
    few = lanes.is_few(run.num, x.dtype, x.device)
    key = (run.choices, few, alone, x.dtype, pool.generation)
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= _PLANS:
            plans.clear()
        plan = _made(module, x, run, few and not alone)
        # Placing one plan's adapters may take the lanes of another's.
        for other in [k for k, p in plans.items() if p.side_by_side and plan.side_by_side]:
            del plans[other]
        plans[key] = plan
    return plan


def _made(module: Any, x: Tensor, run: Run, few: bool) -> Plan:
    choices = [chosen(module, choice) for choice in run.choices]
    names = dict.fromkeys(name for blend in choices for name, _ in blend)
    stacked = _side_by_side(module, x, list(names)) if few and x.is_floating_point() else {}
    groups: dict[int, tuple[lanes.Lanes, dict[str, int]]] = {
        id(l): (l, places) for l, places in stacked.values()
    }
    side_by_side = tuple(
        (
            each,
            tuple(
                tuple((places[name], weight) for name, weight in blend if name in places) for blend in choices
            ),
        )
        for each, places in groups.values()
    )
    apart = tuple(
        (number, rest)
        for number, blend in enumerate(choices)
        if (rest := tuple((name, weight) for name, weight in blend if name not in stacked))
    )
    turns = any(isinstance(module.methods[name], ActivationMethod) for _, blend in apart for name, _ in blend)
    return Plan(side_by_side, apart, turns)


def _side_by_side(module: Any, x: Tensor, names: Sequence[str]) -> dict[str, tuple[lanes.Lanes, dict]]:
    """The adapters that are served from lanes: name -> (the lanes, the place of each adapter in them)."""
    ranked: dict[int, dict[Hashable, Any]] = {}
    for name in names:
        method = module.methods[name]
        if not isinstance(method, WeightMethod) or method.reads or module.base.site.kind != "linear":
            continue
        pair = method.low_rank(module.given(name), module.base)
        if pair is not None and pair[1].shape[0] == module.base.site.out:
            rank = lanes.rank_class(pair[0].shape[0])
            ranked.setdefault(rank, {})[name] = functools.partial(_as_it_is, pair)
    made: dict[str, tuple[lanes.Lanes, dict]] = {}
    for rank, pairs in ranked.items():
        if len(pairs) < 2 or not lanes.suits(rank, len(pairs)):
            continue
        here = module._pool.lanes_at(module._site_name, rank, module.base.shape, x)
        places = here.place(pairs)
        made.update({str(name): (here, places) for name in pairs})
    return made


def _as_it_is(pair: lanes.Pair) -> lanes.Pair:
    return pair
