"""What an adapter adds to a base, counted from shapes: the methods' own `params`, without torch and without tensors."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from peft_dist.catalog import config_class
from peft_dist.contract import Param, Site
from peft_dist.errors import PeftDistError
from peft_dist.targets import BaseFacts, UnmatchedWarning, resolve

from ..errors import SpecError
from ..spec.adapter import peft_config
from ..spec.job import AdapterSpec
from .model_sizes import ModelSizes


@dataclass(frozen=True)
class SiteSizes:
    """One adapted layer."""

    name: str
    in_: int
    out: int
    inner: int
    """Width of what the adapter computes between its tensors: a rank, 0 where there is none."""
    parameters: int

    @property
    def leaf(self) -> str:
        """`q_proj` of `model.layers.0.self_attn.q_proj`."""
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class AdapterSizes:
    """What is trained, in elements."""

    parameters: int
    largest: int
    """Elements of the largest trained tensor: whole tensors are what is sharded."""
    sites: tuple[SiteSizes, ...] = ()
    saved_modules: tuple[SiteSizes, ...] = ()
    """`modules_to_save`, trained whole."""
    virtual_tokens: int = 0
    dropout: float = 0.0
    scales_output: bool = False
    """Whether a site keeps what it gives, not what it takes (IA3)."""


def adapter_sizes(spec: AdapterSpec, sizes: ModelSizes) -> AdapterSizes:
    """Counts the adapter's tensors on this base.

    Raises:
        SpecError: a target or a pattern matches nothing, or a layer that the method cannot adapt.
    """
    config: Any = config_class(spec.type.upper())(**peft_config(spec))
    saved = tuple(_saved_modules(config, sizes))
    if getattr(config, "is_prompt_learning", False):
        tokens = int(getattr(config, "num_tokens", config.num_virtual_tokens))
        own = tokens * sizes.hidden
        return _with(saved, AdapterSizes(own, own, virtual_tokens=tokens))
    sites = tuple(_sites(config, sizes))
    largest = max((size for each in sites for size in (each.parameters,)), default=0)
    total = sum(each.parameters for each in sites)
    scales = spec.type == "ia3"
    return _with(
        saved,
        AdapterSizes(
            total, largest, sites, dropout=float(getattr(config, "dropout", 0.0)), scales_output=scales
        ),
    )


def _with(saved: tuple[SiteSizes, ...], own: AdapterSizes) -> AdapterSizes:
    if not saved:
        return own
    return AdapterSizes(
        own.parameters + sum(each.parameters for each in saved),
        max(own.largest, *(each.parameters for each in saved)),
        own.sites,
        saved,
        own.virtual_tokens,
        own.dropout,
        own.scales_output,
    )


def _sites(config: Any, sizes: ModelSizes) -> list[SiteSizes]:
    kinds = sizes.module_kinds
    facts = BaseFacts(sizes.architecture, kinds, sizes.heads_of_output, sizes.model_type or None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", UnmatchedWarning)  # a typo would quietly leave layers out
            names = resolve(config, facts)
        return [_site(config, name, kinds[name], sizes) for name in names]
    except UnmatchedWarning as error:
        field_name, _, message = str(error).partition(": ")
        raise SpecError(message, where=f"adapter.{field_name}") from error
    except PeftDistError as error:
        message = str(error).removeprefix("targets: ")
        raise SpecError(message, where="adapter.target_modules") from error


def _site(config: Any, name: str, kind: str, sizes: ModelSizes) -> SiteSizes:
    shape = sizes.tensors.get(f"{name}.weight") or (sizes.vocab, sizes.hidden)
    rows, columns = (shape[1], shape[0]) if kind == "embedding" else (shape[0], shape[1])
    bias = math.prod(sizes.tensors.get(f"{name}.bias", (0,)))
    params: dict[str, Param] = config.params(Site(name, rows, columns, kind, bias=bias))  # type: ignore[arg-type]
    trained = [each for each in params.values() if each.trainable]
    inner = max((each.shape[each.dims.index("r")] for each in trained if "r" in each.dims), default=0)
    return SiteSizes(name, columns, rows, inner, sum(math.prod(each.shape) for each in trained))


def _saved_modules(config: Any, sizes: ModelSizes) -> list[SiteSizes]:
    wanted = getattr(config, "modules_to_save", None) or []
    found = []
    for module in sizes.module_kinds:
        if any(module == name or module.endswith(f".{name}") for name in wanted):
            shapes = [shape for name, shape in sizes.tensors.items() if name.startswith(f"{module}.")]
            shapes = shapes or [(sizes.vocab, sizes.hidden)]
            total = sum(math.prod(shape) for shape in shapes)
            found.append(SiteSizes(module, shapes[0][-1], shapes[0][0], 0, total))
    return found
