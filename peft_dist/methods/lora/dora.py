"""DoRA: W' = m (W + s B A) / ||W + s B A||, a trained length m of each row of W and LoRA's direction.

Liu et al. 2024, arXiv:2402.09353; the length that divides is a constant for the gradient (its section 4.3).
Dropout zeroes what the whole update sees, as in HF PEFT. Several active DoRA adapters sum what each changes of
W; in HF PEFT the next one stretches the sum of those before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_dist import starts
from peft_dist.contract import BaseLayer, Enter, Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.lora.variant import Variant
from peft_dist.methods.weight.lora import LoraConfig, per_channel

if TYPE_CHECKING:
    from torch import Tensor

torch, fused = lazy("torch"), lazy("peft_dist.fused")

LENGTHS = "lora_magnitude_vector"


class Dora(Variant):
    """LoRA, or a variant, as the direction."""

    def params(self, site: Site) -> dict[str, Param]:
        ones = (1,) * len(site.kernel)
        dims = (*("1" for _ in ones[:1]), "out", *("1" for _ in ones))
        shape = (*ones[:1], site.out, *ones)
        lengths = Param(f"{LENGTHS}.weight", dims, shape, starts.inherit, saved=LENGTHS)
        return {**super().params(site), "m": lengths}

    def restore(self, saved: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        # As some versions of HF PEFT write it.
        named = {LENGTHS if key == f"{LENGTHS}.weight" else key: t for key, t in saved.items()}
        return super().restore(named, site)

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        super().start_from_base(p, base)
        gpu = self.lora.runtime_config.ephemeral_gpu_offload
        length = self._length_on_gpu(p, base) if gpu else self.length(p, base)
        p["m"].copy_(length.view_as(p["m"]))

    def _length_on_gpu(self, p: Params, base: BaseLayer) -> Tensor:
        if not torch.cuda.is_available():
            raise ConfigError(
                "LoraConfig.runtime_config: ephemeral_gpu_offload needs a GPU, and there is none here. Leave it out."
            )
        change = self.lora.delta({name: t.cuda() for name, t in p.items()}, base)
        return base.plus(base.weight().cuda().to(change.dtype), change).norm(dim=1)

    def length(self, p: Params, base: BaseLayer) -> Tensor:
        """||W + s B A|| (out,), without gradient."""
        with torch.no_grad():
            change = self.lora.delta(p, base)
            return base.plus(base.weight().to(change.dtype), change).norm(dim=1)

    def factor(self, p: Params, base: BaseLayer) -> Tensor:
        """m / ||W + s B A|| (out,)."""
        return p["m"].flatten() / self.length(p, base)

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        change = self.lora.delta(p, base)
        W = base.weight().to(change.dtype)
        return base.plus(self.factor(p, base)[:, None] * base.plus(W, change), -W)

    def factors(self, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return None

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        plain = base.apply(base.weight().to(p["m"].dtype), x)
        return self._stretched(p, base, x, plain)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        entered = enter(x)
        alone = type(self.lora) is LoraConfig and "bias" not in p and entered is x
        if alone and (frozen := fused.exactly(base, x, *p.values())):
            s = self.lora.scaling(base.site)
            return fused.stretched(x, *frozen, p["A"], p["B"], p["m"].flatten(), s)
        y = base(x)
        if entered is not x and self.dropout:
            return y + self.added(p, base, entered)
        # Nothing was dropped: what the layer gave serves again.
        bias = base.bias()
        plain = y if bias is None else y - per_channel(bias.to(y.dtype), base.site)
        return y + self._stretched(p, base, entered, plain)

    def _stretched(self, p: Params, base: BaseLayer, x: Tensor, plain: Tensor) -> Tensor:
        """What is added where W x is `plain`."""
        factor = per_channel(self.factor(p, base), base.site)
        direction = self.lora.added({key: t for key, t in p.items() if key != "bias"}, base, x)
        added = (factor - 1) * plain + factor * direction
        shift = self.bias_delta(p, base)
        return added if shift is None else added + per_channel(shift, base.site)

    @classmethod
    def mixed(cls, methods: Sequence[Any], p: Params, base: BaseLayer, x: Tensor) -> Tensor | None:
        return None
