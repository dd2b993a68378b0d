"""RoAd: pairs of outputs are turned and scaled: y_1' = a cos(t) y_1 - a sin(t) y_2, y_2' = a sin(t) y_1 + a cos(t)
y_2, where a group's first half is paired with its second.

Liao & Monz 2024, arXiv:2409.00119. road_1 has one angle and scale for each pair, road_2 one for each output,
road_4 one for each number of the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import ActivationMethod, BaseLayer, Param, Params, Site
from peft_dist.errors import ConfigError, suggest
from peft_dist.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")

_NUMBERS = {"road_1": 0.5, "road_2": 1, "road_4": 2}


@dataclass
class RoadConfig(TargetedConfig, ActivationMethod):
    """HF PEFT's RoadConfig.

    Args:
        variant: road_1, road_2 or road_4: half, one or two angles and scales for each output.
        group_size: even, divides out; its halves are paired.
        init_weights: True: start at angle 0 and scale 1, which changes nothing; False: at random.
    """

    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    prefix: ClassVar[str] = "road_"
    compose: ClassVar[Literal["add", "chain"]] = "chain"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "ROAD"
        if self.variant not in _NUMBERS:
            raise ConfigError(
                f"RoadConfig.variant: {self.variant!r} is not one of {', '.join(_NUMBERS)}."
                f"{suggest(str(self.variant), _NUMBERS)}"
            )
        if self.group_size <= 0 or self.group_size % 2:
            raise ConfigError(f"RoadConfig.group_size: {self.group_size!r}; it is positive and even.")

    def facts(self, site: Site) -> dict[str, Any]:
        return {"variant": self.variant, "group_size": self.group_size}

    def params(self, site: Site) -> dict[str, Param]:
        if site.out % self.group_size:
            raise ConfigError(
                f"RoadConfig.group_size: {self.group_size} does not divide out = {site.out} of {site.name}."
            )
        n = int(_NUMBERS[self.variant] * site.out)
        theta, alpha = starts.zeros, starts.ones
        if not self.init_weights:
            theta, alpha = starts.gauss(0.5), starts.gauss(0.5, mean=1.0)
        return {
            "theta": Param("road_theta", ("n",), (n,), theta),
            "alpha": Param("road_alpha", ("n",), (n,), alpha),
        }

    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        """What each output is multiplied by, and what its partner (out,)."""
        theta, alpha, g = p["theta"], p["alpha"], self.group_size
        if self.variant == "road_4":
            (t1, t2), (a1, a2) = (v.view(-1, 2, g).unbind(1) for v in (theta, alpha))
            return (a1 * t1.cos()).flatten(), (a2 * t2.sin()).flatten()
        if self.variant == "road_1":
            # Both halves of a group share them.
            theta, alpha = (v.view(-1, 1, g // 2).expand(-1, 2, -1).flatten() for v in (theta, alpha))
        return alpha * theta.cos(), alpha * theta.sin()

    def after(self, p: Params, base: BaseLayer, y: Tensor) -> Tensor:
        own, partner = self.factors(p)
        first, second = y.unflatten(-1, (-1, 2, self.group_size // 2)).unbind(-2)
        return y * own + torch.stack([-second, first], -2).flatten(-3) * partner

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        W = base.weight()
        return self.after(p, base, W.T).T - W

    def bias_delta(self, p: Params, base: BaseLayer) -> Tensor | None:
        b = base.bias()
        return None if b is None else self.after(p, base, b) - b
