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
    lora = method
    while hasattr(lora, "lora"):
        lora = lora.lora
    changed = copy.copy(lora)
    changed.lora_alpha = lora.lora_alpha * factor
    changed.alpha_pattern = {key: alpha * factor for key, alpha in (lora.alpha_pattern or {}).items()}
    return changed.at(site)


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
