"""`ensure_weight_tying`: a layer that shares an embedding's weight takes the embedding's adapter too. Their W are each
other's transposes, so it is s A' B' in the place of s B A."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_dist.contract import BaseLayer, Enter, Param, Params, Site
from peft_dist.methods.lora.variant import Variant

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Tied(Variant):
    """The embedding's tensors on a linear layer: none of its own.

    Args:
        embedding: whose tensors they are.
    """

    embedding: Site

    def params(self, site: Site) -> dict[str, Param]:
        return {}

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        return None

    def turned(self, p: Params, site: Site) -> dict[str, Tensor]:
        """The tensors as the linear layer takes them, with the embedding's s."""
        ratio = self.lora.scaling(self.embedding) / self.lora.scaling(site)
        return {"A": p["B"].mT, "B": p["A"].mT if ratio == 1 else ratio * p["A"].mT}

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        return super().delta(self.turned(p, base.site), base)

    def bias_delta(self, p: Params, base: BaseLayer) -> Tensor | None:
        return None

    def factors(self, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return super().factors(self.turned(p, site), site)

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        return super().added(self.turned(p, base.site), base, x)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        return super().forward(self.turned(p, base.site), base, x, enter)

    @classmethod
    def mixed(cls, methods: Sequence[Any], p: Params, base: BaseLayer, x: Tensor) -> Tensor | None:
        # Borrowed tensors are not stacked: each part runs by itself.
        return None

    def export(self, p: Params, site: Site) -> dict[str, Tensor]:
        turned = self.turned(p, site)
        return {f"lora_{name}.weight": turned[name].contiguous() for name in ("A", "B")}

    def restore(self, saved: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        # Saved here too, as HF PEFT does; read where they are the embedding's.
        return {}
