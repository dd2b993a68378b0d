"""DeLoRA: dW = lambda / r B diag(1 / (|A_k| |B^k|)) A diag(|W_j|): each rank's direction has a norm of one, and
lambda, which is trained, bounds how far the weight moves; columns of W count by their norms.

Bini et al. 2025, arXiv:2503.18225.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.methods.weight.low_rank import LowRankMethod
from peft_dist.targets import by_pattern

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class DeloraConfig(TargetedConfig, LowRankMethod):
    """HF PEFT's DeloraConfig.

    Args:
        r: rank, at least 1.
        delora_lambda: what lambda starts at.
        module_dropout: share of the branch's input that is zeroed while training, in [0, 1).
        bias: which biases are trained too: none, all, or those of the targets (delora_only).
        init_weights: True: B is zero; False: both are random.
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
        rank_pattern, lambda_pattern: other ranks and lambdas, by regular expressions on the ends of names.
    """

    r: int = 8
    delora_lambda: int = 15
    module_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: Literal["none", "all", "delora_only"] = "none"
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    lambda_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None

    prefix: ClassVar[str] = "delora_"
    own_biases: ClassVar[str] = "delora_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "DELORA"
        self.check_layers()
        self.check_bias()
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": r for key, r in (self.rank_pattern or {}).items()}}
        for name, r in ranks.items():
            if not isinstance(r, int) or r < 1:
                raise ConfigError(f"DeloraConfig.{name}: {r!r}; a rank is a whole number of at least 1.")
        if not 0 <= self.module_dropout < 1:
            raise ConfigError(f"DeloraConfig.module_dropout: {self.module_dropout!r}; it lies in [0, 1).")

    @property
    def dropout(self) -> float:
        return self.module_dropout

    def params(self, site: Site) -> dict[str, Param]:
        r = by_pattern(self.rank_pattern or {}, site.name, self.r)
        bound = starts.constant(by_pattern(self.lambda_pattern or {}, site.name, self.delora_lambda))
        last = starts.zeros if self.init_weights else starts.kaiming_uniform
        return {
            "A": Param("delora_A", ("r", "in"), (r, site.in_), starts.kaiming_uniform),
            "B": Param("delora_B", ("out", "r"), (site.out, r), last),
            "lambda": Param("delora_lambda", ("1",), (1,), bound),
            "norms": Param("delora_w_norm", ("in",), (site.in_,), starts.ones, trainable=False),
            **self.bias_params(site),
        }

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        super().start_from_base(p, base)
        p["norms"].copy_(base.weight().norm(dim=0))

    def facts(self, site: Site) -> dict[str, Any]:
        return {"r": by_pattern(self.rank_pattern or {}, site.name, self.r)}

    def pair(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        # A vanishing row of A or column of B counts as one of norm 1e-4.
        norms = p["A"].norm(dim=1).clamp(min=1e-4) * p["B"].norm(dim=0).clamp(min=1e-4)
        return p["A"] * p["norms"], p["B"] * (p["lambda"] / len(norms) / norms)
