"""What methods share whose dW is a product B A of two factors that they make from their tensors."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from peft_dist.contract import BaseLayer, Enter, Params, Site
from peft_dist.lazy import lazy
from peft_dist.methods.weight.bias import BiasedMethod

if TYPE_CHECKING:
    from torch import Tensor

fused = lazy("peft_dist.fused")


class LowRankMethod(BiasedMethod):
    """Defined by `pair`; runs on activations."""

    @abstractmethod
    def pair(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        A, B = self.pair(p, base.site)
        return B @ A

    def low_rank(self, p: Params, base: BaseLayer) -> tuple[Tensor, Tensor, float] | None:
        if base.site.kind != "linear" or self.bias_delta(p, base) is not None:
            return None
        A, B = self.pair(p, base.site)
        return A, B, 1.0

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        A, B = self.pair(p, base.site)
        return self.with_bias(base.mix(B, base.apply(A, x)), p, base)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        frozen = fused.plain(base, x, *p.values())
        if not frozen:
            return super().forward(p, base, x, enter)
        A, B = self.pair(p, base.site)
        return self.with_bias(fused.low_rank(x, enter(x), [(*frozen, A, B, 1.0)])[0], p, base)
