"""X-LoRA: y = W x + sum_k g_k s_k B_k A_k x, a mixture of LoRA adapters whose weights g a small network reads, for
each token and, where asked, each layer, from the last hidden state of a first run of the model.

Buehler & Buehler 2024, arXiv:2402.07148. In the first run every g is `scaling_pass_value`; it gives no gradient. The
network alone is trained, or the experts too. HF PEFT takes experts that are called by the numbers 0, 1, ... alone,
and forgets those that were trained when it saves; here each is saved in a folder of its name,
from which it is loaded again.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.config import PeftConfig, TargetedConfig
from peft_dist.contract import BaseLayer, Enter, Param, Params, Site, WeightMethod
from peft_dist.errors import ConfigError, PeftDistError
from peft_dist.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")

_ON_LAYERS = "base_model.model."
_IN_MIXTURE = "base_model.lora_model.model."
_CLASSIFIER = "internal_xlora_classifier.layers."
_FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class Expert:
    """One of the adapters that are mixed.

    Args:
        name: the mixture's name of it. config: its LoraConfig. tensors: by their names in its checkpoint.
    """

    name: str
    config: Any
    tensors: Mapping[str, Any] = dataclasses.field(repr=False)


@dataclass
class XLoraConfig(TargetedConfig, WeightMethod):
    """HF PEFT's XLoraConfig.

    Args:
        hidden_size: of the base; 4096 where not given.
        adapters: name -> directory, URL or hub id of each LoRA. Where the mixture was saved, the copies beside it are
            taken first.
        enable_softmax: the weights are a softmax over the adapters.
        enable_softmax_topk: the weights that `top_k_lora` leaves are a softmax again.
        layerwise_scalings: weights of their own for each layer.
        xlora_depth: layers of the network, at least 1. xlora_size: its width. xlora_dropout_p: dropout in it.
        use_trainable_adapters: train the adapters too.
        softmax_temperature: divides what the softmax takes; above 0.
        top_k_lora: how many adapters a token uses; all where None.
        scaling_pass_value: the weights in the first run.
        global_scaling_weight: factor of all that the adapters add.
    """

    hidden_size: int | None = None
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    prefix: ClassVar[str] = "internal_xlora_classifier"
    layers: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})
    merges: ClassVar[bool] = False

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        self.peft_type = "XLORA"
        if self.hidden_size is None:
            warnings.warn("XLoraConfig.hidden_size is not given: 4096 is taken.", stacklevel=3)
            self.hidden_size = 4096
        if self.adapters is None:
            warnings.warn("XLoraConfig.adapters is not given: none are mixed.", stacklevel=3)
            self.adapters = {}
        if self.enable_softmax_topk and self.top_k_lora is None:
            warnings.warn("XLoraConfig.enable_softmax_topk: top_k_lora is not set.", stacklevel=3)
        if self.enable_softmax_topk and self.enable_softmax:
            warnings.warn(
                "XLoraConfig.enable_softmax_topk and enable_softmax are both on: a softmax of a softmax is nearly "
                "flat.",
                stacklevel=3,
            )
        for name, least in (("top_k_lora", 1), ("xlora_depth", 1), ("xlora_size", 1), ("hidden_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"XLoraConfig.{name}: {value!r}; it is at least {least}.")
        if self.softmax_temperature <= 0:
            raise ConfigError(
                f"XLoraConfig.softmax_temperature: {self.softmax_temperature!r}; it is above 0."
            )
        if not 0 <= self.xlora_dropout_p < 1:
            raise ConfigError(f"XLoraConfig.xlora_dropout_p: {self.xlora_dropout_p!r}; it lies in [0, 1).")
        self.target_modules, self.exclude_modules, self.modules_to_save = set(), None, None
        self._experts: list[Expert] = []
        self._order: dict[str, int] = {}

    @property
    def experts(self) -> list[Expert]:
        """The adapters that are mixed; known once `assemble` has read them."""
        return self._experts

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The weights (rows, positions, layers, adapters), under a name that is this mixture's own."""
        return (f"xlora_scalings_{id(self)}",)

    def assemble(self, base: Any, read: Callable[[str], Any]) -> None:
        facts = getattr(base, "config", None)
        if getattr(facts, "use_cache", False):
            raise ConfigError(
                "XLoraConfig: the base's `use_cache` must be False: each token's weights come from a run over all. "
                "Set model.config.use_cache = False."
            )
        width = getattr(facts, "hidden_size", self.hidden_size)
        if width != self.hidden_size:
            raise ConfigError(
                f"XLoraConfig.hidden_size: {self.hidden_size}; the base's hidden state has {width}."
            )
        if not self.adapters:
            raise ConfigError("XLoraConfig.adapters: none are given. Name at least one, with its directory.")
        if self.top_k_lora is not None and self.top_k_lora > len(self.adapters):
            raise ConfigError(
                f"XLoraConfig.top_k_lora: {self.top_k_lora} of {len(self.adapters)} adapters. Choose fewer."
            )
        self._experts = [self._read(name, path, read) for name, path in self.adapters.items()]
        if len({expert.config.lora_dropout for expert in self._experts}) > 1:
            warnings.warn(
                "XLoraConfig.adapters: their lora_dropout differ; the first one's is used for all.",
                stacklevel=2,
            )
        names = [
            key.removeprefix(_ON_LAYERS).removesuffix(f".{factor}")
            for expert in self._experts
            for key in expert.tensors
            for factor in _FACTORS
            if key.endswith(f".{factor}")
        ]
        self.target_modules = set(names)

    def _read(self, name: str, path: str, read: Callable[[str], Any]) -> Expert:
        saved, home = None, self.__dict__.get("home")
        if home is not None:
            try:
                saved = read(f"{home}/{name}")
            except PeftDistError:
                saved = None
        saved = saved or read(os.fspath(path))
        config = saved.config
        if config.peft_type != "LORA" or config.use_dora or config.lora_bias or config.bias != "none":
            raise ConfigError(
                f"XLoraConfig.adapters[{name!r}]: {config.peft_type} at {path!r}; only LoRA without DoRA and biases "
                "is mixed."
            )
        if config.target_parameters or config.trainable_token_indices or config.modules_to_save:
            raise ConfigError(
                f"XLoraConfig.adapters[{name!r}]: it trains more than the weights of layers, which cannot be mixed."
            )
        # HF PEFT saves the copies under names of their own.
        tensors = {key.replace(_IN_MIXTURE, _ON_LAYERS, 1): t for key, t in saved.tensors.items()}
        return Expert(name, config, tensors)

    @property
    def dropout(self) -> float:
        return self._experts[0].config.lora_dropout if self._experts else 0.0

    def shared(self, sites: Sequence[Site]) -> dict[str, Param]:
        self._order = {site.name: place for place, site in enumerate(sites)}
        out = len(self._experts) * (len(sites) if self.layerwise_scalings else 1)
        assert self.hidden_size is not None
        widths = [self.hidden_size, *[self.xlora_size] * (self.xlora_depth - 1), out]
        # In the network of HF PEFT an activation, and dropout where there is any, stand between the layers.
        step = 3 if self.xlora_dropout_p > 0 else 2
        wanted = {}
        for number, (in_, out) in enumerate(itertools.pairwise(widths)):
            key = f"{_CLASSIFIER}{number * step}"
            edge = 1 / math.sqrt(in_)
            wanted[f"weight{number}"] = Param(
                f"{key}.weight", ("out", "in"), (out, in_), starts.kaiming_uniform
            )
            wanted[f"bias{number}"] = Param(f"{key}.bias", ("out",), (out,), functools.partial(_within, edge))
        return wanted

    def params(self, site: Site) -> dict[str, Param]:
        wanted = {}
        for number, expert in enumerate(self._experts):
            for name, param in expert.config.params(site).items():
                key = f"{_ON_LAYERS}{site.name}.{param.key}"
                if key not in expert.tensors:
                    continue
                given = expert.tensors[key]
                if tuple(given.shape) != param.shape:
                    raise ConfigError(
                        f"XLoraConfig.adapters[{expert.name!r}]: {key!r} is {tuple(given.shape)} there and "
                        f"{param.shape} here. Was it trained on another base?"
                    )
                first, _, rest = param.key.partition(".")
                wanted[f"{name}{number}"] = dataclasses.replace(
                    param,
                    key=".".join(part for part in (first, str(number), rest) if part),
                    start=functools.partial(_copied, given),
                    trainable=self.use_trainable_adapters,
                    persistent=False,
                    counted=True,
                )
        return wanted

    # --- the weights

    def first_run(self, num_rows: int, length: int) -> dict[str, Tensor]:
        shape = (num_rows, length, len(self._order), len(self._experts))
        return {self.reads[0]: torch.full(shape, float(self.scaling_pass_value))}

    def ahead(
        self, p: Params, hidden: Tensor, drop: Callable[[Tensor, float, str], Tensor]
    ) -> dict[str, Tensor]:
        h = hidden.to(p["weight0"].dtype)
        for number in range(self.xlora_depth):
            h = torch.nn.functional.linear(h, p[f"weight{number}"], p[f"bias{number}"])
            if number < self.xlora_depth - 1:
                h = drop(torch.relu(h), self.xlora_dropout_p, f"xlora_{number}")
        if not self.layerwise_scalings:
            h = h[:, :, None].expand(-1, -1, len(self._order), -1)
        scalings = h.reshape(*h.shape[:2], len(self._order), len(self._experts))
        if self.enable_softmax:
            scalings = torch.softmax(scalings / self.softmax_temperature, dim=-1)
        return {self.reads[0]: scalings}

    def chosen(self, scalings: Tensor) -> Tensor:
        """The weights (..., adapters) as they are used: the `top_k_lora` largest alone, made to sum to one where
        asked."""
        if self.top_k_lora is not None:
            places = scalings.topk(self.top_k_lora, dim=-1).indices
            scalings = scalings * torch.zeros_like(scalings).scatter(-1, places, 1.0)
        if self.enable_softmax_topk:
            used = scalings != 0
            # A token that uses none keeps zeros, not the softmax of nothing.
            lowest = torch.finfo(scalings.dtype).min
            scalings = torch.softmax(scalings.masked_fill(~used, lowest), dim=-1).masked_fill(~used, 0.0)
        return scalings

    # --- on a layer

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        raise ConfigError(
            f"{base.site.name}: X-LoRA changes a layer by another amount for each token, so there is no weight that "
            "does the same. Do not merge it."
        )

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        scalings = self.chosen(p[self.reads[0]][:, :, self._order[base.site.name]])
        lead = x.shape if base.site.kind == "embedding" else x.shape[:-1]
        total = None
        for number, expert in enumerate(self._experts):
            if f"A{number}" not in p:
                continue
            own = {"A": p[f"A{number}"], "B": p[f"B{number}"]}
            # A layer may be given its rows and positions as one axis.
            weight = scalings[..., number].reshape(*lead, 1).to(own["A"].dtype)
            if base.site.kind == "embedding":
                part = weight * expert.config.added(own, base, x)
            else:
                part = expert.config.added(own, base, weight * x)
            total = part if total is None else total + part
        assert total is not None
        return self.global_scaling_weight * total

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        y = base(x)
        return y + self.added(p, base, enter(x)).to(y.dtype)

    # --- saved beside it

    def parts(self, sites: Mapping[str, Params]) -> dict[str, tuple[Any, dict[str, Tensor]]]:
        saved = {}
        for number, expert in enumerate(self._experts):
            tensors = {}
            for site, p in sites.items():
                for factor in _FACTORS:
                    key, name = f"{_ON_LAYERS}{site}.{factor}", f"{factor.split('_')[-1][0]}{number}"
                    if key in expert.tensors and name in p:
                        tensors[key] = p[name]
            saved[expert.name] = (copy.copy(expert.config), tensors)
        return saved

    def saved_at(self, directory: str) -> XLoraConfig:
        """The config as it is written there: trained experts are the copies beside it."""
        if not self.use_trainable_adapters:
            return self
        there = copy.copy(self)
        there.adapters = {name: f"{directory}/{name}" for name in self.adapters or ()}
        return there


def _within(edge: float, t: Tensor) -> Tensor:
    return t.uniform_(-edge, edge)


def _copied(given: Tensor, t: Tensor) -> Tensor:
    return t.copy_(given)
