"""MiCA: B stays at the r left singular directions of W with the smallest singular values, and A, from zero, is all that
is trained.

arXiv:2604.01694, minor component adaptation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft_dist.contract import BaseLayer, Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.lora.variant import Variant, check_directions, check_kind

torch = lazy("torch")


class Mica(Variant):
    """LoRA whose B is frozen at W's minor directions."""

    @classmethod
    def sits_on(cls, lora: Any, site: Site) -> bool:
        check_kind(lora, site, "linear layers and embeddings", ("linear", "embedding"))
        if lora.use_dora:
            raise ConfigError("LoraConfig.init_lora_weights: 'mica' does not go with use_dora. Choose one.")
        return True

    def params(self, site: Site) -> dict[str, Param]:
        check_directions(self.lora, site)
        wanted = super().params(site)
        return {**wanted, "B": replace(wanted["B"], trainable=False, counted=True)}

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        super().start_from_base(p, base)
        W = base.weight()
        U, _, _ = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), full_matrices=False)
        p["B"].copy_(U[:, -self.lora.rank(base.site) :])
        p["A"].zero_()
