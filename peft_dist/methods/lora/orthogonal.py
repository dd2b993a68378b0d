"""The orthogonal start: A and B are random over the even and the odd rows of one orthogonal matrix, so B A = 0
while neither is.

https://datta0.github.io/posts/rethink-lora-init, as in HF PEFT: the factors are a tenth of normal ones.
"""

from __future__ import annotations

from typing import Any

from peft_dist.contract import BaseLayer, Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.lora.variant import Variant, linear_alone

torch = lazy("torch")


class Orthogonal(Variant):
    """LoRA with B A = 0 at the start and gradients for both; an even rank."""

    @classmethod
    def sits_on(cls, lora: Any, site: Site) -> bool:
        return linear_alone(lora, site)

    def params(self, site: Site) -> dict[str, Param]:
        r = self.lora.rank(site)
        if r % 2:
            raise ConfigError(
                f"LoraConfig.r: {r} at {site.name!r}; init_lora_weights 'orthogonal' needs an even rank."
            )
        return super().params(site)

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        super().start_from_base(p, base)
        A, B = p["A"], p["B"]
        r = len(A)
        Q, _ = torch.linalg.qr(torch.randn(r, r, dtype=A.dtype, device=A.device))
        A.copy_(Q[0::2].mT @ A.new_empty(r // 2, A.shape[1]).normal_() / 10)
        B.copy_(B.new_empty(B.shape[0], r // 2).normal_() @ Q[1::2] / 10)
