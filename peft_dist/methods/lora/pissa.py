"""PiSSA: A and B start as the r principal directions of W, so that s B0 A0 = U_r S_r V_r.

Meng et al. 2024, arXiv:2404.02948. `pissa_niter_N` finds them by N subspace iterations from a random start, by
Halko et al. 2009, arXiv:0909.4061.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_dist.contract import BaseLayer
from peft_dist.lazy import lazy
from peft_dist.methods.lora.variant import Residual

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")


class Pissa(Residual):
    """LoRA from the principal directions."""

    def start_factors(self, base: BaseLayer, r: int) -> tuple[Tensor, Tensor]:
        W = base.weight()
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        _, _, iterations = self.lora.start.partition("_niter_")
        if iterations:
            U, S, V = torch.svd_lowrank(W, r, niter=int(iterations))
            Vh = V.mT
        else:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        root = (S[:r] / self.lora.scaling(base.site)).sqrt()
        return U[:, :r] * root, root[:, None] * Vh[:r]
