"""target_parameters: LoRA on a raw parameter, one pair of factors for each matrix that it stacks.

dW_e = s B_e A_e, with A_e (r, in) and B_e (out, r). In a checkpoint the experts' factors lie in one matrix
each, as HF PEFT keeps them: A (experts r, in) expert by expert, B (out, r experts) with the experts innermost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_dist.contract import BaseLayer, Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.lora.variant import Variant

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")


class Experts(Variant):
    """LoRA on a parameter (experts, out, in), or (out, in)."""

    @classmethod
    def sits_on(cls, lora: Any, site: Site) -> bool:
        if site.kind != "experts":
            return False
        wrong = {
            "lora_dropout": lora.lora_dropout,
            "fan_in_fan_out": lora.fan_in_fan_out,
            "lora_bias": lora.lora_bias,
            "use_dora": lora.use_dora,
            "init_lora_weights": lora.start not in ("", "gaussian") and lora.start,
        }
        for name, value in wrong.items():
            if value:
                raise ConfigError(
                    f"LoraConfig.{name}: {value!r} does not go with target_parameters, which names "
                    f"{site.name!r}: its module reads the changed weight as a whole. Leave one of them out."
                )
        return True

    def params(self, site: Site) -> dict[str, Param]:
        r, each = self.lora.rank(site), max(1, site.experts)
        wanted = dict(self.lora.params(site))
        A, B = wanted["A"], wanted["B"]
        wanted["A"] = Param(A.key, ("experts x r", "in"), (each * r, site.in_), A.start)
        wanted["B"] = Param(B.key, ("out", "r x experts"), (site.out, r * each), B.start)
        return wanted

    def factors(self, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return None if site.experts else super().factors(p, site)

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        site = base.site
        if not site.experts:
            return super().delta(p, base)
        A, B = p["A"].unflatten(0, (site.experts, -1)), p["B"].unflatten(1, (-1, site.experts))
        return self.lora.scaling(site) * torch.bmm(B.permute(2, 0, 1), A)
