"""VeRA: dW = diag(b) B diag(d) A; A and B are random, frozen and shared by all layers, b and d are trained.

Kopiczko et al. 2024, arXiv:2310.11454. A (r, in) and B (out, r) are as large as the largest layer needs; each
takes their first columns and rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Enter, Method, Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.weight import projections
from peft_dist.methods.weight.low_rank import LowRankMethod

if TYPE_CHECKING:
    from torch import Tensor

fused = lazy("peft_dist.fused")


@dataclass
class VeraConfig(TargetedConfig, LowRankMethod):
    """HF PEFT's VeraConfig.

    Args:
        r: rows of A, at least 1; higher than LoRA's, since only vectors are trained.
        projection_prng_key: what A and B follow from.
        save_projection: keep A and B in checkpoints; else they are drawn again from the key.
        vera_dropout: share of the branch's input that is zeroed while training, in [0, 1).
        d_initial: what d starts at.
        fan_in_fan_out: the weight is stored (in, out); known from the layer, kept for checkpoints.
        bias: which biases are trained too: none, all, or those of the targets (vera_only).
        init_weights: True: b starts at 0, which changes nothing; False: b at 1 and d at random.
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
    """

    r: int = 256
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    prefix: ClassVar[str] = "vera_lambda_"
    own_biases: ClassVar[str] = "vera_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "VERA"
        self.check_layers(of_str=False)
        self.check_bias()
        if not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"VeraConfig.r: {self.r!r}; a rank is a whole number of at least 1.")
        if not 0 <= self.vera_dropout < 1:
            raise ConfigError(f"VeraConfig.vera_dropout: {self.vera_dropout!r}; it lies in [0, 1).")
        projections.warn_unsaved(self, "vera_A and vera_B")

    def check_beside(self, others: Sequence[Method]) -> None:
        projections.check_beside(self, others)

    @property
    def dropout(self) -> float:
        return self.vera_dropout

    def shared(self, sites: Sequence[Site]) -> dict[str, Param]:
        a, b = (self.r, max(site.in_ for site in sites)), (max(site.out for site in sites), self.r)
        pair = projections.kaiming(self.projection_prng_key, a, b)
        return {
            "A": Param("vera_A", ("r", "largest in"), a, pair(0), False, persistent=self.save_projection),
            "B": Param("vera_B", ("largest out", "r"), b, pair(1), False, persistent=self.save_projection),
        }

    def params(self, site: Site) -> dict[str, Param]:
        b = starts.zeros if self.init_weights else starts.ones
        d = starts.constant(self.d_initial) if self.init_weights else starts.normal
        return {
            "b": Param("vera_lambda_b", ("out",), (site.out,), b),
            "d": Param("vera_lambda_d", ("r",), (self.r,), d),
            **self.bias_params(site),
        }

    def facts(self, site: Site) -> dict[str, Any]:
        return {"r": self.r}

    def pair(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        return p["A"][:, : site.in_], p["b"][:, None] * p["B"][: site.out] * p["d"]

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        frozen = fused.plain(base, x, *p.values())
        if not frozen:
            return super().forward(p, base, x, enter)
        (out, in_), entered = base.shape, enter(x)
        y = fused.projected(x, entered, *frozen, p["A"][:, :in_], p["B"][:out], p["b"], p["d"])
        return self.with_bias(y, p, base)

    def restore(self, saved: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        is_shared = site.kind == "module"
        return projections.check_saved(self, saved, ("vera_A", "vera_B")) if is_shared else saved
