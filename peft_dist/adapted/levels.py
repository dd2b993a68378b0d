"""Several adapters on one layer: each with the layer that it changes, and the way down through them and up again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peft_dist.adapted.entrance import Entrance
from peft_dist.base_layer import Layer
from peft_dist.contract import ActivationMethod, BaseLayer, Params, SiteMethod


@dataclass(frozen=True)
class Level:
    """One adapter of several on a layer: it sees `under`, the layer as those before it left it."""

    name: str
    method: SiteMethod
    p: Params
    under: BaseLayer


class Adjusted:
    """A layer with the changes of some levels in its weight and bias; all else is the layer's own."""

    def __init__(self, base: Layer, levels: Sequence[Level]) -> None:
        self._base, self._levels = base, tuple(levels)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._base, attribute)

    def __call__(self, x: Tensor) -> Tensor:
        return self._base(x)

    def weight(self) -> Tensor:
        W = self._base.weight()
        for level in self._levels:
            W = self._base.plus(W, level.method.delta(level.p, level.under))
        return W

    def bias(self) -> Tensor | None:
        b = self._base.bias()
        for level in self._levels:
            db = level.method.bias_delta(level.p, level.under)
            b = db if b is None else b if db is None else b + db
        return b


def down(levels: list[Level], x: Tensor) -> list[Tensor]:
    """What each level takes, the lowest first, and below it what the layer takes: levels + 1 tensors."""
    inputs = [x]
    for level in reversed(levels):
        if isinstance(level.method, ActivationMethod):
            x = level.method.before(level.p, level.under, x)
        inputs.append(x)
    return inputs[::-1]


def up(levels: list[Level], inputs: list[Tensor], y: Tensor, entrance: Entrance) -> Tensor:
    """What the adapted layer gives, from y, what the layer gave, in y's dtype."""
    given = y.dtype
    for level, x in zip(levels, inputs[1:], strict=True):
        if isinstance(level.method, ActivationMethod):
            y = level.method.after(level.p, level.under, y)
        else:
            y = y + level.method.added(level.p, level.under, entrance.of(level.method, level.p)(x))  # type: ignore[attr-defined]
    return y.to(given)
