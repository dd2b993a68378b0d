"""How strongly, and in which dtype, adapters act for a while: context managers over a model's layers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peft_dist.adapted import Adapted
from peft_dist.contract import Site
from peft_dist.errors import AdapterError
from peft_dist.tuner_layer import peft_types


def scaled(method: Any, site: Site, factor: float) -> Any:
    """LoRA, or a variant of it, at a layer with its scaling multiplied."""
    lora = _plain(method)
    changed = copy.copy(lora)
    changed.lora_alpha = lora.lora_alpha * factor
    changed.alpha_pattern = {key: alpha * factor for key, alpha in (lora.alpha_pattern or {}).items()}
    return changed.at(site)


def with_scaling(method: Any, site: Site, value: float) -> Any:
    """A low-rank method at a layer with another scaling there.

    Raises:
        AdapterError: it has no scaling, or cannot have this one.
    """
    plain = _plain(method)
    alpha = next((name for name in ("lora_alpha", "alpha") if hasattr(plain, name)), None)
    if alpha is None or not callable(getattr(plain, "scaling", None)):
        raise AdapterError(f"{site.name}: the scaling of {type(plain).__name__} is not to be set.")
    changed = copy.copy(plain)
    changed.alpha_pattern = {}
    setattr(changed, alpha, 1.0)
    # Of a method that takes 0 for a default of its own.
    setattr(changed, alpha, value / changed.scaling(site) or 1e-30)
    if abs(changed.scaling(site) - value) > 1e-6 * max(1.0, abs(value)):
        raise AdapterError(f"{site.name}: the scaling of {type(plain).__name__} cannot be {value}.")
    return changed.at(site)


def with_dropout(method: Any, site: Site, p: float) -> Any:
    """LoRA, or a variant of it, at a layer with another share of its input left out while training."""
    changed = copy.copy(_plain(method))
    changed.lora_dropout = p
    return changed.at(site)


def _plain(method: Any) -> Any:
    while hasattr(method, "lora"):
        method = method.lora
    return method


class LayersDropout(nn.Dropout):
    """The dropout of an adapter at a layer, as programs read and set it."""

    def __init__(self, layer: Any, adapter: str, p: float) -> None:
        super().__init__(p)
        # No submodule: it stands for a setting of the layer's.
        self.__dict__["_told"] = (layer, adapter)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "p" and "_told" in self.__dict__:
            layer, adapter = self.__dict__["_told"]
            layer.take_dropout(adapter, float(value))


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the context the change of every LoRA adapter is multiplied by `multiplier`.

    Raises:
        TypeError: it is no number. AdapterError: there is no LoRA layer.
    """
    if not isinstance(multiplier, (int, float)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    modules = [m for m in model.modules() if isinstance(m, Adapted) and peft_types(m) & {"LORA", "ADALORA"}]
    if not modules:
        raise AdapterError("scaling is only supported for models with `LoraLayer`s")
    before = [dict(module.methods) for module in modules]
    for module in modules:
        module.methods = {
            name: scaled(method, module.base.site, multiplier) if hasattr(method, "lora_alpha") else method
            for name, method in module.methods.items()
        }
    try:
        yield
    finally:
        for module, methods in zip(modules, before, strict=True):
            module.methods = methods


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within the context adapters compute in the dtype of what a layer is given, where hooks of another library
    see to dtypes."""
    modules = [module for module in model.modules() if isinstance(module, Adapted)] if active else []
    before = [module.casts for module in modules]
    for module in modules:
        module.casts = False
    try:
        yield
    finally:
        for module, casts in zip(modules, before, strict=True):
            module.casts = casts


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters become `dtype`, trained ones fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    for module in model.modules():
        for adapter in getattr(module, "adapters", ()) if hasattr(module, "take_in") else ():
            module.take_in(adapter)  # type: ignore[operator]
