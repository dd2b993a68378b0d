"""CorDA: A and B start as directions of W that count for a context: of W C = U S V', C the covariance of the
layer's inputs, s B0 A0 = U_r S_r V_r' C^-1.

Yang et al. 2024, arXiv:2406.05223. `preprocess_corda` finds the factors before the adapter is added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_dist.contract import BaseLayer
from peft_dist.errors import ConfigError
from peft_dist.methods.lora.variant import Residual

if TYPE_CHECKING:
    from torch import Tensor

# Where a layer keeps (U, S, V) until an adapter starts from them.
EIGENS = "corda_eigens"


class Corda(Residual):
    """LoRA from a context's directions."""

    def start_factors(self, base: BaseLayer, r: int) -> tuple[Tensor, Tensor]:
        layer: Any = base.layer  # type: ignore[attr-defined]
        kept = layer.__dict__.get(EIGENS)
        name = base.site.name
        if kept is None:
            raise ConfigError(
                f"init_lora_weights 'corda': {name!r} is not prepared. Call preprocess_corda(model, config, "
                "run_model) on the base first."
            )
        U, S, V = (t.to(base.weight().device) for t in kept)
        if U.shape != (base.site.out, r) or V.shape != (base.site.in_, r):
            raise ConfigError(
                f"init_lora_weights 'corda': {name!r} was prepared for rank {len(S)}, not {r}, or for another "
                "layer. Call preprocess_corda with this config."
            )
        root = (S / self.lora.scaling(base.site)).sqrt()
        return U * root, root[:, None] * V.mT
