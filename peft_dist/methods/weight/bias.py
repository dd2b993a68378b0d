"""Each adapter's own copy of the biases of layers that its method does not sit on: LoRA's `bias: all`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peft_dist import starts
from peft_dist.contract import BaseLayer, Param, Params, Site, WeightMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BiasCopy(WeightMethod):
    """b' in the place of b; W stays."""

    prefix: ClassVar[str] = "bias"

    def params(self, site: Site) -> dict[str, Param]:
        return {"bias": Param("own_bias", ("out",), (site.bias,), starts.inherit, saved="bias")}

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        p["bias"].copy_(base.bias())  # type: ignore[arg-type]

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        W = base.weight()
        return W.new_zeros(W.shape)

    def bias_delta(self, p: Params, base: BaseLayer) -> Tensor:
        return p["bias"] - base.bias()  # type: ignore[operator]

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        shift = self.bias_delta(p, base)
        return shift.view(-1, *(1,) * len(base.site.kernel))
