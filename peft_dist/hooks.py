"""HF PEFT's injection hooks: what a method of a user's own overrides that is given as a subclass of `BaseTuner`
instead of by the contract. Its layers are subclasses of `BaseTunerLayer`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_dist import inject
from peft_dist.adapted import AdapterModule
from peft_dist.config import PeftConfig
from peft_dist.errors import AdapterError, TargetError
from peft_dist.targets import all_linear, is_all_linear, is_target, usual_targets
from peft_dist.tuner_layer import BaseTunerLayer, hooked_layers


@dataclass
class _Whole(PeftConfig):
    """The part of a config that is the engine's also for methods with hooks."""

    modules_to_save: list[str] | None = None


class Hooks:
    """The hooks, with what they do where a method does not override them.

    Attributes:
        prefix: what the names of the method's tensors start with. tuner_layer_cls: the class of its layers.
        target_module_mapping: architecture -> usual targets.
    """

    prefix: ClassVar[str] = ""
    tuner_layer_cls: ClassVar[Any] = BaseTunerLayer
    target_module_mapping: ClassVar[Mapping[str, Any]] = {}
    uses_shared_state: ClassVar[bool] = False
    peft_config: dict[str, Any]
    model: Any

    @classmethod
    def has_hooks(cls) -> bool:
        """Whether this is a method given by hooks."""
        return cls._create_and_replace is not Hooks._create_and_replace

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        return None

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        return None

    def _prepare_adapter_config(self, peft_config: Any, model_config: Mapping[str, Any]) -> Any:
        """The config with its targets filled in."""
        if peft_config.target_modules is None:
            known = self.target_module_mapping or usual_targets("LORA")
            usual = known.get(model_config.get("model_type", ""))
            if usual is None:
                raise TargetError(
                    "Please specify `target_modules` in `peft_config`: "
                    f"{model_config.get('model_type')!r} has no usual ones."
                )
            peft_config.target_modules = usual if isinstance(usual, str) else set(usual)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        return None

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        """Whether the module called `key` is a target."""
        return is_target(peft_config, key)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        return None

    def _check_new_adapter_config(self, config: Any) -> None:
        return None

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Puts an adapter on `target`: wraps it in a layer of the method, or adds to the one that is there."""
        raise NotImplementedError(f"{type(self).__name__}._create_and_replace")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module) -> None:
        """Hangs `new_module` in the place of `child`, on its device."""
        setattr(parent, child_name, new_module)
        weight = next(iter(child.parameters()), None)
        if weight is None:
            return
        for name, module in new_module.named_modules():
            if self.prefix in name and not any(p.is_meta for p in module.parameters()):
                module.to(weight.device)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freezes the base; biases are trained where a config says so."""
        kept = {id(p) for _, layer in hooked_layers(model) for p in _own(layer).values()}
        kept |= {
            id(p)
            for _, module in inject.adapter_modules(model)
            for name in module.adapters
            for p in module.tensors(name).values()
        }
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)
        for config in self.peft_config.values():
            bias = getattr(config, "bias", "none")
            for name, parameter in model.named_parameters():
                if bias == "all" and name.rpartition(".")[2] == "bias":
                    parameter.requires_grad_(True)
            for _, layer in hooked_layers(model):
                if str(bias).endswith("_only") and layer.bias is not None:
                    layer.bias.requires_grad_(True)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)

    @staticmethod
    def get_model_config(model: Any) -> dict[str, Any]:
        """The base's config as a dictionary; where it has none, its `model_type` is `custom`."""
        config: Any = getattr(model, "config", None)
        if hasattr(config, "to_dict"):
            config = config.to_dict()
        if not config:
            return {"model_type": "custom"}
        return dict(config) if isinstance(config, Mapping) else dict(vars(config))


def inject_by_hooks(
    tuner: Any,
    adapter: str,
    adapters: inject.Adapters,
    *,
    autocast_adapter_dtype: bool,
    low_cpu_mem_usage: bool,
    names: set[str] | None,
) -> list[str]:
    """Puts an adapter on the base as the tuner's hooks say; names of the layers that it sits on.

    Raises:
        TargetError: no module is a target; AdapterError: the name is taken.
    """
    model, config = tuner.model, tuner.peft_config[adapter]
    tuner._check_new_adapter_config(config)
    config = tuner._prepare_adapter_config(config, tuner.get_model_config(model))
    tuner._prepare_model(config, model)
    if is_all_linear(getattr(config, "target_modules", None)):
        facts = inject.facts_of(model, inject.places(model))
        config.target_modules = all_linear(config, facts)
    inside = tuple(f"{name}." for name, _ in hooked_layers(model))
    modules = [
        (key, module)
        for key, module in model.named_modules()
        if key and not key.startswith(inside or ("\0",))
    ]
    targets = []
    for key, _ in modules:
        chosen = key in names if names is not None else tuner._check_target_module_exists(config, key)
        if not chosen:
            continue
        parent_name, _, name = key.rpartition(".")
        parent, target = model.get_submodule(parent_name), model.get_submodule(key)
        if isinstance(target, AdapterModule):
            raise AdapterError(f"{key}: adapters of another kind sit on it; {type(tuner).__name__} cannot.")
        tuner._check_target_module_compatiblity(config, model, name)
        with torch.device("meta") if low_cpu_mem_usage else contextlib.nullcontext():
            tuner._create_and_replace(config, adapter, target, name, parent, current_key=key)
        targets.append(key)
    if not targets:
        raise TargetError(
            f"Target modules {getattr(config, 'target_modules', None)} not found in the base model. Please check "
            "the target modules and try again."
        )
    if getattr(config, "modules_to_save", None):
        whole = _Whole(modules_to_save=list(config.modules_to_save))
        inject.inject(model, whole, adapter, adapters, low_cpu_mem_usage=low_cpu_mem_usage)
    tuner._mark_only_adapters_as_trainable(model)
    tuner._cast_adapter_dtype(adapter, autocast_adapter_dtype)
    return targets


def _own(layer: Any, adapter: str | None = None) -> dict[str, Tensor]:
    return {
        f"{attribute}.{name}" if not rest else f"{attribute}.{name}.{rest}": tensor
        for attribute, name, part in layer.adapter_parts()
        if adapter in (None, name)
        for rest, tensor in (part.named_parameters() if isinstance(part, nn.Module) else [("", part)])
    }


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Half-precision tensors of an adapter become fp32; others stay as they are."""
    if not autocast_adapter_dtype:
        return
    for _, layer in hooked_layers(model):
        for tensor in _own(layer, adapter_name).values():
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()
    for _, module in inject.adapter_modules(model):
        if adapter_name in module.adapters:
            half = [
                t for t in module.tensors(adapter_name).values() if t.dtype in (torch.float16, torch.bfloat16)
            ]
            for tensor in half:
                tensor.data = tensor.data.float()
            if half:
                module.take_in(adapter_name)


def remove_hooked(model: nn.Module) -> None:
    """Puts the base's own layers back in the place of a method's with hooks."""
    for name, layer in list(hooked_layers(model)):
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, layer.get_base_layer())


def delete_hooked(model: nn.Module, adapter: str) -> None:
    """Removes an adapter from a method's layers with hooks.

    Raises:
        AdapterError: it is merged.
    """
    layers = list(hooked_layers(model))
    for name, layer in layers:
        if adapter in layer.merged_adapters:
            raise AdapterError(f"{name}: adapter {adapter!r} is merged. Unmerge it before deleting it.")
    for _, layer in layers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.delete_adapter(adapter)


def hooked_names(state_dict: Mapping[str, Any], prefix: str) -> set[str]:
    """The layers that the names of an adapter's tensors belong to."""
    return {
        key.removeprefix("base_model.model.").removeprefix("_orig_mod.").rsplit(f".{prefix}", 1)[0]
        for key in state_dict
        if f".{prefix}" in key
    }


@contextlib.contextmanager
def without_hooked(model: nn.Module) -> Iterator[None]:
    """Within the context the layers of methods with hooks leave the base alone."""
    layers = [(layer, layer.disable_adapters) for _, layer in hooked_layers(model)]
    for layer, _ in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, before in layers:
            layer._disable_adapters = before
