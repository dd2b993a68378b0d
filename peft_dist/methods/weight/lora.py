"""LoRA: dW = s B A with s = alpha / r, or alpha / sqrt(r) (rsLoRA).

Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. On an embedding A looks ids
up; on a convolution A is a convolution with r channels and B one with a 1 x 1 kernel. With `bias` each
adapter trains its own copy of the biases, so that adapters with biases stand side by side (HF PEFT trains
the base's own).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Enter, Param, Params, Site, WeightMethod
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.targets import by_pattern

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")


@dataclass
class LoraConfig(TargetedConfig, WeightMethod):
    """HF PEFT's LoraConfig.

    Args:
        r: rank, at least 1.
        lora_alpha: scales the update by alpha / r.
        lora_dropout: share of the branch's input that is zeroed while training, in [0, 1).
        fan_in_fan_out: the weight is stored (in, out); known from the layer, kept for checkpoints.
        bias: which biases are trained too: none, all, or those of the targets (lora_only).
        use_rslora: scale by alpha / sqrt(r).
        init_lora_weights: True: A Kaiming uniform, B zero; "gaussian": A normal, B zero; False: both random.
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
        rank_pattern, alpha_pattern: other ranks and alphas, by regular expressions on the ends of names.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | Literal["gaussian"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    prefix: ClassVar[str] = "lora_"
    layers: ClassVar[frozenset[str]] = frozenset(
        {"linear", "embedding", "conv1d", "conv2d", "conv3d", "mha", "experts"}
    )
    without_effect: ClassVar[dict[str, Any]] = {
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "trainable_token_indices": None,
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "use_dora": False,
        "velora_config": None,
        "alora_invocation_tokens": None,
        "use_qalora": False,
        "qalora_group_size": 16,
        "monteclora_config": None,
        "layer_replication": None,
        "lora_bias": False,
        "target_parameters": None,
        "use_bdlora": None,
        "arrow_config": None,
        "kasa_config": None,
        "ensure_weight_tying": False,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "LORA"
        for name, r in {
            "r": self.r,
            **{f"rank_pattern[{key!r}]": r for key, r in self.rank_pattern.items()},
        }.items():
            if not isinstance(r, int) or r < 1:
                raise ConfigError(f"LoraConfig.{name}: {r!r}; a rank is a whole number of at least 1.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"LoraConfig.lora_dropout: {self.lora_dropout!r}; it lies in [0, 1).")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"LoraConfig.bias: {self.bias!r} is not one of none, all, lora_only.")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"LoraConfig.init_lora_weights: {self.init_lora_weights!r} is not one of True, False, "
                "'gaussian'."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError(
                "LoraConfig.layers_to_transform: cannot be used when `target_modules` is a str."
            )
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ConfigError("LoraConfig.layers_pattern: cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("LoraConfig.layers_pattern: `layers_to_transform` must be given with it.")

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    def rank(self, site: Site) -> int:
        """r at `site`."""
        return by_pattern(self.rank_pattern, site.name, self.r)

    def scaling(self, site: Site) -> float:
        """s at `site`."""
        r, alpha = self.rank(site), by_pattern(self.alpha_pattern, site.name, self.lora_alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def params(self, site: Site) -> dict[str, Param]:
        r, zero = self.rank(site), self.init_lora_weights is not False
        a = starts.gaussian(r) if self.init_lora_weights == "gaussian" else starts.kaiming_uniform
        b = starts.zeros if zero else starts.kaiming_uniform
        if site.kind == "embedding":
            # HF PEFT starts an embedding's factors the other way round.
            a, b = (starts.zeros if zero else starts.normal), starts.normal
            wanted = {
                "A": Param("lora_embedding_A", ("r", "in"), (r, site.in_), a),
                "B": Param("lora_embedding_B", ("out", "r"), (site.out, r), b),
            }
        else:
            kernel = tuple(f"kernel_{i}" for i in range(len(site.kernel)))
            ones = (1,) * len(site.kernel)
            channels = site.in_ // math.prod(site.kernel)
            wanted = {
                "A": Param("lora_A.weight", ("r", "in", *kernel), (r, channels, *site.kernel), a),
                "B": Param("lora_B.weight", ("out", "r", *("1" for _ in ones)), (site.out, r, *ones), b),
            }
        if self.bias != "none" and site.bias:
            saved = "base_layer.bias"
            wanted["bias"] = Param("lora_own_bias", ("out",), (site.bias,), starts.inherit, saved=saved)
        return wanted

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        if "bias" in p:
            p["bias"].copy_(base.bias())  # type: ignore[arg-type]

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        return self.scaling(base.site) * (p["B"].flatten(1) @ p["A"].flatten(1))

    def bias_delta(self, p: Params, base: BaseLayer) -> Tensor | None:
        return p["bias"] - base.bias() if "bias" in p else None  # type: ignore[operator]

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        h = base.apply(p["A"].flatten(1), x) * self.scaling(base.site)
        y = base.mix(p["B"].flatten(1), h)
        shift = self.bias_delta(p, base)
        if shift is None:
            return y
        return y + (shift if not base.site.kernel else shift.view(-1, *(1,) * len(base.site.kernel)))

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        y = base(x)
        if base.site.kind != "linear" or "bias" in p or y.dtype != p["B"].dtype or y.ndim < 2:
            return y + self.added(p, base, enter(x))
        # One product that adds to y in place of a product and a sum.
        h = base.apply(p["A"], enter(x)).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), h, p["B"].T, alpha=self.scaling(base.site)).view_as(y)

    @classmethod
    def mixed(cls, methods: Sequence[LoraConfig], p: Params, base: BaseLayer, x: Tensor) -> Tensor | None:
        if base.site.kind != "linear" or "bias" in p:
            return None
        scaling = torch.tensor([m.scaling(base.site) for m in methods], dtype=x.dtype, device=x.device)
        rows = x.flatten(1, -2)
        h = torch.bmm(rows, p["A"].mT) * scaling[:, None, None]
        return torch.bmm(h, p["B"].mT).view(*x.shape[:-1], -1)
