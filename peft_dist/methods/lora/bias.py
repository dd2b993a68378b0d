"""lora_bias: B has a bias of its own, so that b' = b + s c."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_dist import starts
from peft_dist.contract import BaseLayer, Enter, Param, Params, Site
from peft_dist.errors import AdapterWarning, ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.lora.variant import Variant
from peft_dist.methods.weight.lora import per_channel

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")


class Biased(Variant):
    """LoRA whose B has a bias c (out,)."""

    @classmethod
    def sits_on(cls, lora: Any, site: Site) -> bool:
        if site.kind in ("embedding", "mha", "experts"):
            raise ConfigError(
                f"LoraConfig.lora_bias: {site.name!r} is a {site.kind}, where B has no bias. Leave it out of "
                "the targets, or lora_bias."
            )
        if not site.bias:
            warnings.warn(
                f"LoraConfig.lora_bias: {site.name!r} has no bias, so that it cannot be merged.",
                AdapterWarning,
                stacklevel=2,
            )
        return True

    def params(self, site: Site) -> dict[str, Param]:
        zero = self.lora.init_lora_weights is not False
        start = starts.zeros if zero else starts.uniform(self.lora.rank(site) ** -0.5)
        return {**super().params(site), "c": Param("lora_B.bias", ("out",), (site.out,), start)}

    def bias_delta(self, p: Params, base: BaseLayer) -> Tensor:
        shift = self.lora.scaling(base.site) * p["c"]
        under = super().bias_delta(p, base)
        return shift if under is None else shift + under

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        return super().added(p, base, x) + self._shift(p, base)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        return super().forward(p, base, x, enter) + self._shift(p, base)

    def _shift(self, p: Params, base: BaseLayer) -> Tensor:
        return per_channel(self.lora.scaling(base.site) * p["c"], base.site)

    @classmethod
    def mixed(cls, methods: Sequence[Any], p: Params, base: BaseLayer, x: Tensor) -> Tensor | None:
        added = super().mixed(methods, p, base, x)
        if added is None:
            return None
        shifts = [m.lora.scaling(base.site) * c for m, c in zip(methods, p["c"], strict=True)]
        return added + torch.stack(shifts).view(len(shifts), *(1,) * (added.ndim - 2), -1)
