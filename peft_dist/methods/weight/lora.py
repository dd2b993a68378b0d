"""LoRA: dW = s B A with s = alpha / r, or alpha / sqrt(r) (rsLoRA).

Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. On an embedding A looks ids
up; on a convolution A is a convolution with r channels and B one with a 1 x 1 kernel. With `bias` each
adapter trains its own copy of the biases, so that adapters with biases stand side by side (HF PEFT trains
the base's own).
"""

from __future__ import annotations

import importlib
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Enter, Param, Params, Site, WeightMethod
from peft_dist.errors import ConfigError, suggest
from peft_dist.lazy import lazy
from peft_dist.methods.lora.settings import CordaConfig, EvaConfig, LoftQConfig, LoraRuntimeConfig, nested
from peft_dist.methods.replace.trainable_tokens import check_tokens
from peft_dist.targets import by_pattern

if TYPE_CHECKING:
    from torch import Tensor

torch, fused = lazy("torch"), lazy("peft_dist.fused")


# Which field asks for which variant, in the order in which they wrap LoRA. Nothing of them is imported before.
VARIANTS: tuple[tuple[Callable[[LoraConfig], bool], str], ...] = (
    (lambda c: c.start.startswith("pissa"), "peft_dist.methods.lora.pissa:Pissa"),
    (lambda c: c.start == "olora", "peft_dist.methods.lora.olora:Olora"),
    (lambda c: c.start == "corda", "peft_dist.methods.lora.corda:Corda"),
    (lambda c: c.start == "loftq", "peft_dist.methods.lora.loftq:Loftq"),
    (lambda c: c.start == "orthogonal", "peft_dist.methods.lora.orthogonal:Orthogonal"),
    (lambda c: c.start == "mica", "peft_dist.methods.lora.mica:Mica"),
    (lambda c: c.lora_bias, "peft_dist.methods.lora.bias:Biased"),
    (lambda c: c.use_dora, "peft_dist.methods.lora.dora:Dora"),
    (lambda c: bool(c.target_parameters), "peft_dist.methods.lora.experts:Experts"),
)
# Where programs look for an adapter's tensors on any layer with LoRA.
HOLDERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_STARTS = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica")
_NITER = re.compile(r"pissa_niter_\d+")
# Fields of variants that are not here, with the values that leave them out.
_NOT_HERE: dict[str, tuple[Any, ...]] = {
    "megatron_config": (None,),
    "megatron_core": ("megatron.core", None),
    "qalora_group_size": (16, None),
    "lora_ga_config": (None,),
    "velora_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "monteclora_config": (None,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
}


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
        init_lora_weights: True: A Kaiming uniform, B zero; "gaussian": A normal, B zero; False: both random;
            "orthogonal", "pissa", "pissa_niter_N", "olora", "eva", "corda", "loftq", "mica": see `methods/lora`.
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
        rank_pattern, alpha_pattern: other ranks and alphas, by regular expressions on the ends of names.
        trainable_token_indices: rows of the embeddings that are trained beside the adapter: of the input's,
            or by the name of an embedding.
        loftq_config, eva_config, corda_config: settings of these starts.
        use_dora: train the length of each row of W apart (arXiv:2402.09353).
        layer_replication: ranges (start, end) of decoder layers that the model is to be made of: copies share
            weights and have adapters of their own.
        runtime_config: of this run alone.
        lora_bias: B has a bias.
        target_parameters: names of raw parameters, such as the experts of a mixture model.
        ensure_weight_tying: adapters of tied embeddings are tied too.
        megatron_config, megatron_core, lora_ga_config, velora_config, alora_invocation_tokens, use_qalora,
            qalora_group_size, monteclora_config, use_bdlora, arrow_config, kasa_config: not supported.
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
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict[str, int] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    prefix: ClassVar[str] = "lora_"
    layers: ClassVar[frozenset[str]] = frozenset(
        {"linear", "embedding", "conv1d", "conv2d", "conv3d", "mha", "experts"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "LORA"
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self._check_numbers()
        self._check_layers()
        for name, values in _NOT_HERE.items():
            value = getattr(self, name)
            if value not in values:
                raise ConfigError(
                    f"LoraConfig.{name}: {value!r} is not supported; only {values[0]!r} is. Train or convert "
                    "the adapter without it."
                )
        self._settle_starts()

    def _check_numbers(self) -> None:
        where = type(self).__name__
        for name, r in {
            "r": self.r,
            **{f"rank_pattern[{key!r}]": r for key, r in (self.rank_pattern or {}).items()},
        }.items():
            if not isinstance(r, int) or r < 1:
                raise ConfigError(f"{where}.{name}: {r!r}; a rank is a whole number of at least 1.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"{where}.lora_dropout: {self.lora_dropout!r}; it lies in [0, 1).")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"{where}.bias: {self.bias!r} is not one of none, all, lora_only.")

    def _check_layers(self) -> None:
        where = type(self).__name__
        if self.trainable_token_indices is not None:
            given = self.trainable_token_indices
            for name, tokens in given.items() if isinstance(given, dict) else [(None, given)]:
                check_tokens(f"{where}.trainable_token_indices" + (f"[{name!r}]" if name else ""), tokens)
        if isinstance(self.target_parameters, str):
            raise ConfigError(
                f"{where}.target_parameters: {self.target_parameters!r}; it is a list of names, or None."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError(f"{where}.layers_to_transform: cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ConfigError(f"{where}.layers_pattern: cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(f"{where}.layers_pattern: `layers_to_transform` must be given with it.")

    def _settle_starts(self) -> None:
        start = self.init_lora_weights
        known = isinstance(start, bool) or self.start in _STARTS or _NITER.fullmatch(self.start)
        if not known:
            raise ConfigError(
                f"LoraConfig.init_lora_weights: {start!r} is not one of True, False, "
                f"{', '.join(map(repr, _STARTS))}, 'pissa_niter_N'.{suggest(str(start), _STARTS)}"
            )
        self.runtime_config = nested("runtime_config", self.runtime_config, LoraRuntimeConfig)
        self.eva_config = nested("LoraConfig.eva_config", self.eva_config, EvaConfig)
        self.corda_config = nested("LoraConfig.corda_config", self.corda_config, CordaConfig)
        if self.start == "loftq":
            if not self.loftq_config:
                raise ConfigError(
                    "LoraConfig.loftq_config: must be given where init_lora_weights is 'loftq'."
                )
            self.loftq_config = dict(vars(nested("LoraConfig.loftq_config", self.loftq_config, LoftQConfig)))
        elif self.loftq_config:
            self.loftq_config = {}
            warnings.warn("loftq_config has no effect where init_lora_weights is not 'loftq'.", stacklevel=4)
        for name, kind in (("eva", EvaConfig), ("corda", CordaConfig)):
            if self.start == name and getattr(self, f"{name}_config") is None:
                warnings.warn(
                    f"init_lora_weights is {name!r} without {name}_config: its defaults are used.",
                    stacklevel=4,
                )
                setattr(self, f"{name}_config", kind())
            elif self.start != name and getattr(self, f"{name}_config") is not None:
                warnings.warn(
                    f"{name}_config has no effect where init_lora_weights is not {name!r}.", stacklevel=4
                )
        if self.lora_bias and not isinstance(start, bool):
            raise ConfigError(
                f"LoraConfig.lora_bias: goes with init_lora_weights True or False, not {start!r}."
            )
        if self.ensure_weight_tying and self.use_dora:
            raise ConfigError(
                "LoraConfig.ensure_weight_tying: does not go with use_dora, whose lengths are those of one layer."
            )
        if self.lora_bias and self.use_dora:
            raise ConfigError("LoraConfig.lora_bias: does not go with use_dora. Choose one.")

    @property
    def start(self) -> str:
        """The start's name in lower case; empty where it has none."""
        return self.init_lora_weights.lower() if isinstance(self.init_lora_weights, str) else ""

    def at(self, site: Site) -> WeightMethod:
        method: WeightMethod = self
        for asks, variant in VARIANTS:
            if asks(self):
                module, _, name = variant.partition(":")
                chosen = getattr(importlib.import_module(module), name)
                if chosen.sits_on(self, site):
                    method = chosen(method)
        return method

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    def tied(self, site: Site) -> WeightMethod | None:
        if not self.ensure_weight_tying or site.kind != "embedding":
            return None
        return importlib.import_module("peft_dist.methods.lora.tied").Tied(self, site)

    def rank(self, site: Site) -> int:
        """r at `site`."""
        return by_pattern(self.rank_pattern, site.name, self.r) if self.rank_pattern else self.r

    def scaling(self, site: Site) -> float:
        """s at `site`."""
        r, alpha = self.rank(site), self.lora_alpha
        if self.alpha_pattern:
            alpha = by_pattern(self.alpha_pattern, site.name, alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def facts(self, site: Site) -> dict[str, Any]:
        dropout = torch.nn.Dropout(self.lora_dropout) if self.lora_dropout else torch.nn.Identity()
        return {
            "r": self.rank(site),
            "lora_alpha": by_pattern(self.alpha_pattern or {}, site.name, self.lora_alpha),
            "scaling": self.scaling(site),
            "lora_dropout": dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "adapter_layer_names": HOLDERS,
        }

    def params(self, site: Site) -> dict[str, Param]:
        r, zero = self.rank(site), self.init_lora_weights is not False
        a = starts.gaussian(r) if self.start == "gaussian" else starts.kaiming_uniform
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
            # A reads all channels also where the layer has groups; B then mixes each group's share of r.
            channels = site.in_ // math.prod(site.kernel) * site.groups
            if r % site.groups:
                raise ConfigError(
                    f"{type(self).__name__}.r: {r} at {site.name!r}, a convolution with {site.groups} groups; "
                    "they must divide the rank. Choose another by rank_pattern, or leave the layer out."
                )
            wanted = {
                "A": Param("lora_A.weight", ("r", "in", *kernel), (r, channels, *site.kernel), a),
                "B": Param(
                    "lora_B.weight",
                    ("out", "r", *("1" for _ in ones)),
                    (site.out, r // site.groups, *ones),
                    b,
                ),
            }
        if self.bias != "none" and site.bias:
            saved = "base_layer.bias"
            wanted["bias"] = Param("lora_own_bias", ("out",), (site.bias,), starts.inherit, saved=saved)
        return wanted

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        if "bias" in p:
            p["bias"].copy_(base.bias())  # type: ignore[arg-type]

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        A, B, groups = p["A"].flatten(1), p["B"].flatten(1), base.site.groups
        if groups == 1:
            return (self.scaling(base.site) * B) @ A
        each = torch.bmm(B.unflatten(0, (groups, -1)), A.unflatten(0, (groups, -1)))
        return self.scaling(base.site) * each.flatten(0, 1)

    def factors(self, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        """(B (out, k), A (k, in)) with dW = B A; None where dW is no product of such."""
        if site.groups > 1:
            return None
        return self.scaling(site) * p["B"].flatten(1), p["A"].flatten(1)

    def low_rank(self, p: Params, base: BaseLayer) -> tuple[Tensor, Tensor, float] | None:
        if base.site.kind != "linear" or "bias" in p:
            return None
        return p["A"], p["B"], self.scaling(base.site)

    def bias_delta(self, p: Params, base: BaseLayer) -> Tensor | None:
        return p["bias"] - base.bias() if "bias" in p else None  # type: ignore[operator]

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        h = base.apply(p["A"].flatten(1), x) * self.scaling(base.site)
        y = base.mix(p["B"].flatten(1), h)
        shift = self.bias_delta(p, base)
        return y if shift is None else y + per_channel(shift, base.site)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        if part := self._part(p, base, x):
            return fused.low_rank(x, enter(x), [part])[0]
        y = base(x)
        if base.site.kind != "linear" or "bias" in p or y.dtype != p["B"].dtype or y.ndim < 2:
            return y + self.added(p, base, enter(x))
        # One product that adds to y in place of a product and a sum.
        h = base.apply(p["A"], enter(x)).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), h, p["B"].T, alpha=self.scaling(base.site)).view_as(y)

    def _part(self, p: Params, base: BaseLayer, x: Tensor) -> Any:
        """What one node needs of a layer with its adapter; None where it is to be called."""
        frozen = None if "bias" in p else fused.plain(base, x, p["A"], p["B"])
        return frozen and (*frozen, p["A"], p["B"], self.scaling(base.site))

    @classmethod
    def together(
        cls, methods: Sequence[LoraConfig], ps: Sequence[Params], bases: Sequence[BaseLayer], x: Tensor
    ) -> Sequence[Tensor] | None:
        parts = [m._part(p, base, x) for m, p, base in zip(methods, ps, bases, strict=True)]
        return fused.low_rank(x, x, parts) if all(parts) else None

    @classmethod
    def mixed(cls, methods: Sequence[LoraConfig], p: Params, base: BaseLayer, x: Tensor) -> Tensor | None:
        if base.site.kind != "linear" or "bias" in p:
            return None
        h = torch.bmm(x.flatten(1, -2), p["A"].mT) * cls._scales(methods, base, x)
        return torch.bmm(h, p["B"].mT).view(*x.shape[:-1], -1)

    @classmethod
    def by_slot(
        cls, methods: Sequence[LoraConfig], arrays: Params, base: BaseLayer
    ) -> tuple[Tensor, Tensor, list[float]] | None:
        if base.site.kind != "linear" or arrays.keys() != {"A", "B"}:
            return None
        return arrays["A"], arrays["B"], [method.scaling(base.site) for method in methods]

    @classmethod
    def adds_in_place(cls, p: Params, base: BaseLayer) -> bool:
        return base.site.kind == "linear" and "bias" not in p

    @classmethod
    def add_mixed(
        cls, methods: Sequence[LoraConfig], p: Params, base: BaseLayer, x: Tensor, y: Tensor
    ) -> None:
        h = torch.bmm(x.flatten(1, -2), p["A"].mT).mul_(cls._scales(methods, base, x))
        y.view(*h.shape[:2], -1).baddbmm_(h, p["B"].mT)

    @staticmethod
    def _scales(methods: Sequence[LoraConfig], base: BaseLayer, x: Tensor) -> float | Tensor:
        """Their scalings: one where it is that of all, else (k, 1, 1)."""
        distinct = {id(m): m for m in methods}
        scales = {key: m.scaling(base.site) for key, m in distinct.items()}
        if len(set(scales.values())) == 1:
            return scales[id(methods[0])]
        each = torch.tensor([scales[id(m)] for m in methods], dtype=x.dtype, device=x.device)
        return each[:, None, None]


def per_channel(v: Tensor, site: Site) -> Tensor:
    """v (out,) so that it broadcasts over what the layer gives."""
    return v if not site.kernel else v.view(-1, *(1,) * len(site.kernel))
