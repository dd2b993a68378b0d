"""What libraries do with adapters in a model that they own: no class around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peft_dist import inject
from peft_dist.adapted import AdapterModule
from peft_dist.entry import get_peft_model_state_dict as get_peft_model_state_dict
from peft_dist.entry import inject_adapter_in_model as inject_adapter_in_model
from peft_dist.entry import set_peft_model_state_dict as set_peft_model_state_dict
from peft_dist.errors import AdapterError, suggest
from peft_dist.hooks import cast_adapter_dtype as cast_adapter_dtype
from peft_dist.hooks import delete_hooked
from peft_dist.tuner_layer import BaseTunerLayer, hooked_layers

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type = BaseTunerLayer,
) -> None:
    """Makes adapters active on every layer of `layer_cls`; they alone are trained, and none in
    `inference_mode`.

    Raises:
        AdapterError: no layer has one of this name.
    """
    names = _known(model, adapter_name)
    for module in model.modules():
        if isinstance(module, layer_cls) or (
            isinstance(module, AdapterModule) and layer_cls is BaseTunerLayer
        ):
            module.set_adapter(names, inference_mode=inference_mode)  # type: ignore[operator]


def set_requires_grad(
    model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True
) -> None:
    """Lets adapters be trained, or not, whether they are active or not."""
    names = _known(model, adapter_names)
    inject.set_requires_grad(model, names, requires_grad)
    for _, layer in hooked_layers(model):
        layer.set_requires_grad(names, requires_grad)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type = BaseTunerLayer
) -> list[str] | None:
    """Removes an adapter from every layer; the adapters that are active then.

    Raises:
        AdapterError: no layer has one of this name, or it is merged.
    """
    _known(model, adapter_name)
    delete_hooked(model, adapter_name)
    inject.delete(model, adapter_name)
    left = _names(model)
    # A module that is trained whole tells of its own copies alone.
    active = max((list(m.active_adapters) for _, m in inject.adapter_modules(model)), key=len, default=[])
    if left and not active:
        active = left[:1]
        inject.activate(model, active)
    return active or None


def _names(model: nn.Module) -> list[str]:
    found = [name for _, module in inject.adapter_modules(model) for name in module.adapters]
    found += [name for _, layer in hooked_layers(model) for name in layer._all_available_adapter_names()]
    return list(dict.fromkeys(found))


def _known(model: Any, names: str | Sequence[str]) -> list[str]:
    wanted, known = [names] if isinstance(names, str) else list(names), _names(model)
    for name in wanted:
        if name not in known:
            raise AdapterError(f"adapter {name!r}: no layer has one of this name.{suggest(name, known)}")
    return wanted
