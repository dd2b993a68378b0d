"""One LoRA adapter's values in the place of another's, in the same memory: a compiled model goes on running.

A model that is prepared holds every adapter at one rank, the rest of it zero, and its scalings as tensors, so that
ranks and alphas may differ without compiling again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from peft_dist import checkpoint
from peft_dist.adapted import Adapted
from peft_dist.catalog import PeftType
from peft_dist.config import PeftConfig
from peft_dist.contract import BaseLayer, Enter, Param, Params, Site
from peft_dist.errors import AdapterError, CheckpointError, ConfigError
from peft_dist.methods.lora.bias import Biased
from peft_dist.methods.lora.variant import Variant
from peft_dist.methods.weight.lora import LoraConfig, per_channel
from peft_dist.tuner_layer import peft_types

# What else than the tensors decides the output; it must be equal.
CONFIG_KEYS_TO_CHECK: dict[str, list[str]] = {
    PeftType.LORA: ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]
}


@dataclass(frozen=True)
class Prepared(Variant):
    """LoRA at a rank that may exceed its own, with a scaling that is a tensor.

    Args:
        rank_held: of the tensors. scale: the scaling, a scalar tensor.
    """

    rank_held: int = 0
    scale: Tensor | None = None

    def params(self, site: Site) -> dict[str, Param]:
        return {
            name: Param(**{**vars(param), "shape": _at_rank(name, param.shape, self.rank_held, site)})
            for name, param in self.lora.params(site).items()
        }

    def _unscaled(self, base: BaseLayer) -> Any:
        return self.scale / self.lora.scaling(base.site)  # type: ignore[operator]

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        return self._unscaled(base) * self.lora.delta(p, base)

    def bias_delta(self, p: Params, base: BaseLayer) -> Tensor | None:
        if "c" not in p:
            return self.lora.bias_delta(p, base)
        shift, under = cast(Tensor, self.scale) * p["c"], self.lora.lora.bias_delta(p, base)
        return shift if under is None else shift + under

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        y = base.mix(p["B"].flatten(1), base.apply(p["A"].flatten(1), x) * cast(Tensor, self.scale))
        shift = self.bias_delta(p, base)
        return y if shift is None else y + per_channel(shift, base.site)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        return base(x) + self.added(p, base, enter(x))

    @classmethod
    def mixed(cls, methods: Any, p: Params, base: BaseLayer, x: Tensor) -> Tensor | None:
        return None


def _at_rank(name: str, shape: tuple[int, ...], r: int, site: Site) -> tuple[int, ...]:
    """The shape of A or B at a rank; a convolution's groups share it."""
    return {"A": (r, *shape[1:]), "B": (shape[0], r // site.groups, *shape[2:])}.get(name, shape)


def _layers(model: nn.Module) -> list[tuple[str, Adapted]]:
    """(name, layer) of the layers with LoRA."""
    return [
        (name.removeprefix("_orig_mod."), module)
        for name, module in model.named_modules()
        if isinstance(module, Adapted) and "LORA" in peft_types(module)
    ]


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: PeftConfig | dict[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Gives every LoRA adapter `target_rank` and a scaling that is a tensor, before the model is compiled.

    Args:
        target_rank: at least the largest rank that will be swapped in; None leaves the ranks.
        config: configs of the adapters, whose `r` becomes `target_rank`.

    Raises:
        AdapterError: there is no LoRA layer, or one of a larger rank. ConfigError: the model is compiled already.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(f"check_compiled: {check_compiled!r} is not one of 'error', 'warn', 'ignore'.")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        message = "prepare_model_for_compiled_hotswap is to be called before the model is compiled."
        if check_compiled == "error":
            raise ConfigError(message)
        if check_compiled == "warn":
            warnings.warn(f"{message} It will be compiled again.", stacklevel=2)
    layers = [(name, module, adapter) for name, module in _layers(model) for adapter in module.methods]
    if not layers:
        raise AdapterError(
            "No adapter layers found on the model. Load the first adapter before preparing it."
        )
    for name, module, adapter in layers:
        method = module.methods[adapter]
        r = method.rank(module.base.site)
        if not isinstance(method.lora if isinstance(method, Biased) else method, LoraConfig):
            raise AdapterError(
                f"{name}: {type(method).__name__} cannot be swapped in a compiled model; only plain LoRA, also with "
                "biases."
            )
        if target_rank is not None and r > target_rank:
            raise AdapterError(f"{name}: adapter {adapter!r} has rank {r}, over target_rank {target_rank}.")
        if target_rank is not None and target_rank % module.base.site.groups:
            raise ConfigError(
                f"{name}: target_rank {target_rank} at a convolution with {module.base.site.groups} groups, which must "
                "divide it. Choose another."
            )
    for _, module, adapter in layers:
        method = module.methods[adapter]
        site = module.base.site
        old = {key: t.detach().clone() for key, t in module.tensors(adapter).items()}
        trained = {key: t.requires_grad for key, t in module.tensors(adapter).items()}
        scale = torch.tensor(method.scaling(site), dtype=torch.float32, device=old["A"].device)
        prepared = Prepared(method, target_rank or method.rank(site), scale)
        _rehold(module, adapter, prepared, old["A"].dtype, old["A"].device)
        for key, tensor in module.tensors(adapter).items():
            _copy_into(tensor, old[key], site.groups if key == "A" else 1)
            tensor.requires_grad_(trained[key])
    configs: Any = config.values() if isinstance(config, dict) else [config] if config else []
    for each in configs if target_rank is not None else ():
        each.r = target_rank
        each.rank_pattern = dict.fromkeys(each.rank_pattern or {}, target_rank)


def _rehold(module: Adapted, adapter: str, method: Any, dtype: torch.dtype, device: Any) -> None:
    module.drop(adapter)
    module.add(adapter, method, module.base, dtype, device)


def _copy_into(room: Tensor, values: Tensor, groups: int) -> None:
    """Copies values of a smaller rank; the rest of the room is zero. Ranks of a grouped convolution's A are per
    group."""
    with torch.no_grad():
        room.zero_()
        if room.shape[1:] == values.shape[1:]:
            parts = zip(room.unflatten(0, (groups, -1)), values.unflatten(0, (groups, -1)), strict=True)
            for place, part in parts:
                place[: len(part)] = part.to(place)
        else:
            room[:, : values.shape[1]] = values.to(room)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """Puts the tensors of `state_dict`, by their names in a checkpoint or in the model, in the place of an
    adapter's, and its config's scalings. Layers that it lacks change nothing any more.

    Raises:
        AdapterError: the adapter is merged, or not there. CheckpointError: tensors without a layer here, or that
            do not fit it. Nothing is changed then.
    """
    layers = [(name, module) for name, module in _layers(model) if adapter_name in module.methods]
    if not layers:
        raise AdapterError(f"adapter {adapter_name!r}: no LoRA layer has one of this name.")
    for name, module in layers:
        if adapter_name in module.merged_adapters:
            raise AdapterError(
                f"{name}: Cannot hot-swap adapter {adapter_name!r} because it is currently merged into the base "
                "weights. Unmerge it first."
            )
    given = {
        key.removeprefix("_orig_mod.").replace(f".{adapter_name}", "", 1): t for key, t in state_dict.items()
    }
    plan, used = [], set()
    for name, module in layers:
        site, held = module.base.site, module.methods[adapter_name]
        method = config.at(site)
        here: dict[str, Tensor] = {}
        for key, param in method.params(site).items():
            full = f"{name}.{param.saved or param.key}"
            if full in given and key in module.wanted(adapter_name):
                here[key] = given[full]
                used.add(full)
        r = method.rank(site)
        for key, tensor in here.items():
            wanted = _at_rank(key, tuple(module.wanted(adapter_name)[key].shape), r, site)
            if tuple(tensor.shape) != wanted:
                raise CheckpointError(
                    f"{name}.{key}: is {tuple(tensor.shape)} there; a rank of {r} has {wanted} here."
                )
        if isinstance(held, Prepared) and r > held.rank_held:
            raise CheckpointError(
                f"{name}: the new adapter has rank {r}, over {held.rank_held}, for which the model was prepared."
            )
        plan.append((module, method, here))
    unexpected = [key for key in given if key not in used]
    if unexpected:
        raise HotswapError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}."
        )
    for module, method, here in plan:
        _swap(module, adapter_name, method, here)


class HotswapError(CheckpointError, RuntimeError):
    """An adapter that sits on layers on which the one before does not."""


def _swap(module: Adapted, adapter: str, method: Any, here: Mapping[str, Tensor]) -> None:
    site, held = module.base.site, module.methods[adapter]
    if isinstance(held, Prepared):
        assert held.scale is not None
        held.scale.fill_(method.scaling(site))
    else:
        first = next(iter(module.tensors(adapter).values()))
        if any(tuple(module.tensors(adapter)[key].shape) != tuple(t.shape) for key, t in here.items()):
            trained = {key: t.requires_grad for key, t in module.tensors(adapter).items()}
            _rehold(module, adapter, method, first.dtype, first.device)
            for key, tensor in module.tensors(adapter).items():
                tensor.requires_grad_(trained[key])
        module.methods[adapter] = method
    for key, tensor in module.tensors(adapter).items():
        if key in here:
            _copy_into(tensor, here[key], site.groups if key == "A" else 1)
        else:
            with torch.no_grad():
                tensor.zero_()


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Whether one adapter can take the place of another.

    Raises:
        ConfigError: they are of other methods, or of one that cannot be swapped, or a field that decides the
            output differs.
    """
    if config0.peft_type != config1.peft_type:
        raise ConfigError(f"Incompatible PEFT types found: {config0.peft_type} and {config1.peft_type}")
    if config0.peft_type not in CONFIG_KEYS_TO_CHECK:
        raise ConfigError(
            f"Hotswapping only supports {', '.join(CONFIG_KEYS_TO_CHECK)} but {config0.peft_type} was passed."
        )
    for key in CONFIG_KEYS_TO_CHECK[config0.peft_type]:
        one, other = getattr(config0, key), getattr(config1, key)
        if one != other:
            raise ConfigError(f"Configs are incompatible: for {key}, {one} != {other}")


def hotswap_adapter(
    model: Any,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Puts the adapter of a directory or a hub id in the place of one that the model has.

    Args:
        torch_device: where its tensors are read to; the model's stay where they are.
        kwargs: `revision`, `subfolder`, `token`, `key_mapping`, as in `checkpoint.read`.

    Raises:
        ConfigError, CheckpointError, AdapterError: it does not fit; the model is as it was.
    """
    saved = checkpoint.read(model_name_or_path, **kwargs)
    inner = getattr(model, "_orig_mod", model)
    if adapter_name not in inner.peft_config:
        raise AdapterError(f"adapter {adapter_name!r}: the model has none of this name.")
    check_hotswap_configs_compatible(inner.peft_config[adapter_name], saved.config)
    saved.config.inference_mode = inner.peft_config[adapter_name].inference_mode
    tensors = {key: t if torch_device is None else t.to(torch_device) for key, t in saved.tensors.items()}
    prepared = any(isinstance(m.methods.get(adapter_name), Prepared) for _, m in _layers(inner))
    hotswap_adapter_from_state_dict(inner, tensors, adapter_name, saved.config)
    if not prepared:
        inner.peft_config[adapter_name] = saved.config
