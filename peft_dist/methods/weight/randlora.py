"""RandLoRA: dW = s sum over n of B_n diag(lambda_n) A diag(gamma_n), s = alpha / r: a full rank from random bases.

Albert et al. 2025, arXiv:2502.00987. A (r, smaller) and the B_n (larger, r) are random, frozen and shared by all
layers; each takes what its size needs, n up to ceil(min(in, out) / r). A stands on the smaller side of the layer,
so that what is trained is small. B's columns count n first and A's rows r first, as in HF PEFT's checkpoints.
"""

from __future__ import annotations

import math
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
class RandLoraConfig(TargetedConfig, LowRankMethod):
    """HF PEFT's RandLoraConfig.

    Args:
        r: rank of each random basis, at least 1; a smaller one trains more.
        projection_prng_key: what the bases follow from.
        save_projection: keep them in checkpoints; else they are drawn again from the key.
        sparse: bases of -1, 0 and 1, two thirds 0.
        very_sparse: the same with 1 / root of the smaller size not 0.
        randlora_dropout: share of the branch's input that is zeroed while training, in [0, 1).
        fan_in_fan_out: the weight is stored (in, out); known from the layer, kept for checkpoints.
        randlora_alpha: scales the update by alpha / r.
        bias: which biases are trained too: none, all, or those of the targets (randlora_only).
        init_weights: True: lambda starts at 0, which changes nothing; False: at random.
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
    """

    r: int = 32
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: int = 640
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: str | None = None

    prefix: ClassVar[str] = "randlora_"
    own_biases: ClassVar[str] = "randlora_only"
    full_size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "RANDLORA"
        self.check_bias()
        if not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"RandLoraConfig.r: {self.r!r}; a rank is a whole number of at least 1.")
        if not 0 <= self.randlora_dropout < 1:
            raise ConfigError(
                f"RandLoraConfig.randlora_dropout: {self.randlora_dropout!r}; it lies in [0, 1)."
            )
        projections.warn_unsaved(self, "the random bases")

    def check_beside(self, others: Sequence[Method]) -> None:
        projections.check_beside(self, others)

    @property
    def dropout(self) -> float:
        return self.randlora_dropout

    def num_bases(self, smaller: int) -> int:
        """How many bases make up a full rank."""
        return math.ceil(smaller / self.r)

    def shared(self, sites: Sequence[Site]) -> dict[str, Param]:
        smaller, larger = sorted((max(site.out for site in sites), max(site.in_ for site in sites)))
        sizes = (self.projection_prng_key, self.r, smaller, larger, self.num_bases(smaller))
        if self.sparse or self.very_sparse:
            pair = projections.ternary(*sizes, sparsity=math.sqrt(smaller) if self.very_sparse else 3)
        else:
            pair = projections.normalised(*sizes)
        kept = self.save_projection
        first, second = (self.r, 1, smaller), (larger, sizes[-1], self.r)
        return {
            "A": Param("randlora_A", ("r", "1", "smaller"), first, pair(0), False, persistent=kept),
            "B": Param("randlora_B", ("larger", "n", "r"), second, pair(1), False, persistent=kept),
        }

    def params(self, site: Site) -> dict[str, Param]:
        smaller, larger = sorted((site.out, site.in_))
        num = self.num_bases(smaller)
        small = starts.constant(1 / max(num, smaller) if self.init_weights else 1 / larger)
        first = starts.zeros if self.init_weights else starts.normal
        return {
            "lambda": Param("randlora_lambda", ("r", "n"), (self.r, num), first),
            "gamma": Param("randlora_gamma", ("n", "smaller"), (num, smaller), small),
            **self.bias_params(site),
        }

    def facts(self, site: Site) -> dict[str, Any]:
        return {"r": self.r, "scaling": self.randlora_alpha / self.r}

    def pair(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        smaller, larger = sorted((site.out, site.in_))
        num = p["gamma"].shape[0]
        first = self.randlora_alpha / self.r * p["lambda"]
        small = (first[:, :, None] * p["gamma"] * p["A"][..., :smaller]).flatten(0, 1)
        large = p["B"][:larger].flatten(1)[:, : num * self.r]
        return (small, large) if smaller == site.in_ else (large.T, small.T)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        out, in_ = base.shape
        # With a rank this high one sum with W costs less than two products for each row of x.
        is_cheaper = x.numel() // in_ > out * in_ / (out + in_)
        return fused.by_delta(self, p, base, x, enter) if is_cheaper else super().forward(p, base, x, enter)

    def export(self, p: Params, site: Site) -> dict[str, Tensor] | None:
        if site.kind == "module":
            return None
        own = {param.saved or param.key: p[name] for name, param in self.params(site).items()}
        # HF PEFT saves what is shared with each layer too.
        return {**own, "randlora_A": p["A"], "randlora_B": p["B"]} if self.save_projection else own

    def restore(self, saved: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        shared = ("randlora_A", "randlora_B")
        if site.kind == "module":
            return projections.check_saved(self, saved, shared)
        # HF PEFT saves the model's at each layer again.
        return {key: tensor for key, tensor in saved.items() if key not in shared}
