"""What the adapters of a model are doing, layer by layer and as a whole, as HF PEFT reports it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import transformers
from torch import nn

from peft_dist.adapted import AdapterModule, Replaced
from peft_dist.base_layer import has_door
from peft_dist.errors import AdapterError
from peft_dist.methods.lora.tokens import RowsBeside
from peft_dist.model import PeftModel
from peft_dist.packed import quantised_name
from peft_dist.tuner_layer import BaseTunerLayer, HookedTensors, layer_title, peft_types

Flag: TypeAlias = "bool | Literal['irregular']"
IRREGULAR: Literal["irregular"] = "irregular"


@dataclass
class TunerLayerStatus:
    """One layer: its name, what it is, and per adapter what is trained and where."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Flag]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """A model: `irregular` where its layers disagree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: Flag
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, Flag]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every layer with adapters.

    Raises:
        TypeError: the adapters sit on no layers. AdapterError: there are none.
    """
    found = [
        _of_layer(name, module)
        for name, module in _around(model, "get_layer_status").named_modules()
        if isinstance(module, (BaseTunerLayer, Replaced)) or _has_token_rows(module)
    ]
    if not found:
        raise AdapterError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT "
            "adapters injected in the model."
        )
    return found


def get_model_status(model: Any) -> TunerModelStatus:
    """The state of a model's adapters as a whole.

    Raises:
        TypeError: the adapters sit on no layers. AdapterError: there are none.
    """
    layers = get_layer_status(_around(model, "get_model_status"))
    wrapped = isinstance(model, PeftModel)
    base = model.get_base_model() if wrapped else model
    trained, every = PeftModel.get_nb_trainable_parameters(model)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    merged = {name for layer in layers for name in layer.merged_adapters}
    is_merged_in_part = any(
        merged & (set(each.available_adapters) - set(each.merged_adapters)) for each in layers
    )
    return TunerModelStatus(
        base_model_type=type(base).__name__
        if isinstance(base, transformers.PreTrainedModel) or wrapped
        else "other",
        adapter_model_type=type(model.base_model).__name__ if wrapped else "None",
        peft_types={name: str(c.peft_type) for name, c in model.peft_config.items()} if wrapped else {},
        trainable_params=trained,
        total_params=every,
        num_adapter_layers=len(layers),
        enabled=_agreed(layer.enabled for layer in layers),
        active_adapters=_agreed(layer.active_adapters for layer in layers),
        merged_adapters=IRREGULAR if is_merged_in_part else sorted(merged),
        requires_grad={
            name: _agreed(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in names
        },
        available_adapters=names,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, ())})
            for name in names
        },
        quantization_backend=_agreed(layer.quantization_backend for layer in layers),
    )


def _around(model: Any, asked: str) -> nn.Module:
    if not isinstance(model, PeftModel):
        return model
    if model.active_adapters and model.active_peft_config.is_prompt_learning:
        raise TypeError(
            f"{asked}: {model.active_peft_config.peft_type} sits on no layers, so there is nothing to say."
        )
    return model.base_model


def _has_token_rows(module: nn.Module) -> bool:
    """Whether an adapter on other layers trains tokens of this embedding too (`trainable_token_indices`)."""
    return isinstance(module, AdapterModule) and any(
        isinstance(method, RowsBeside) for method in module.methods.values()
    )


def _of_layer(name: str, module: Any) -> TunerLayerStatus:
    tensors: Any = module if isinstance(module, AdapterModule) else HookedTensors(module)
    trained = {
        adapter: [
            t.requires_grad
            for key, t in tensors.tensors(adapter).items()
            if tensors.wanted(adapter)[key].trainable
        ]
        for adapter in tensors.adapters
    }
    beside = _has_token_rows(module) and not isinstance(module, BaseTunerLayer)
    return TunerLayerStatus(
        name=f"{name}.token_adapter" if beside else name,
        module_type="TrainableTokensLayer" if beside else layer_title(module),
        enabled=not module.disable_adapters,
        active_adapters=list(module.active_adapters),
        merged_adapters=[name for name in module.merged_adapters if name in tensors.adapters],
        requires_grad={adapter: _agreed(flags) for adapter, flags in trained.items()},
        available_adapters=sorted(tensors.adapters),
        devices={
            adapter: sorted({t.device.type for t in tensors.tensors(adapter).values()})
            for adapter in tensors.adapters
        },
        quantization_backend=_quantised(module),
    )


def _agreed(values: Iterable[Any]) -> Any:
    kept = list(values)
    return kept[0] if kept and all(value == kept[0] for value in kept) else IRREGULAR if kept else True


def _quantised(module: Any) -> str | None:
    """HF PEFT names a backend for the methods that it reaches quantised weights of by one."""
    layer = module.get_base_layer()
    known = {"Linear8bitLt": "bnb 8bit", "Linear4bit": "bnb 4bit"}
    generic = {"BOFT", "MISS", "BONE", "OFT", "SHIRA", "VERA"}
    if not isinstance(module, AdapterModule) or not peft_types(module) & generic or not has_door(layer):
        return None
    return known.get(quantised_name(type(layer)) or "")
