"""Functions of HF PEFT that find modules and names in a model: private ones that its `peft.utils` exports."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_dist.compat.classes import AuxiliaryTrainingWrapper
from peft_dist.errors import ConfigError
from peft_dist.pooled import name_in, outer_modules


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(the module's parent, the module, its name there)."""
    above, _, last = key.rpartition(".")
    return model.get_submodule(above), model.get_submodule(key), last


def _get_submodules_with_grandparent(
    model: nn.Module, key: str
) -> tuple[nn.Module, nn.Module, nn.Module, str]:
    """(the module's parent, what holds that, the module, its name)."""
    parent, module, last = _get_submodules(model, key)
    return parent, model.get_submodule(".".join(key.split(".")[:-2])), module, last


def _get_input_embeddings_name(model: Any, default: str | None = None) -> str | None:
    """What a model calls its input embeddings."""
    if not hasattr(model, "get_input_embeddings"):
        return default
    name = name_in(model, model.get_input_embeddings())
    return default if name is None else name


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freezes the Parameters in whose names the adapter's name is."""
    for name, parameter in model.named_parameters():
        if adapter_name in name:
            parameter.requires_grad_(False)


def _set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Makes an adapter active in the modules that are trained whole."""
    for _, module in outer_modules(model):
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.set_adapter(adapter_name, inference_mode=inference_mode)


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether a name is `target_key` or ends in a dot and it."""
    return key == target_key or key.endswith(f".{target_key}")


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """How many rows a batch has."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ConfigError("You have to provide either input_ids or inputs_embeds")
    return given.shape[0]


def get_embedding_layer_name(
    model: nn.Module, layer: nn.Module, is_embedding_in_target_modules: bool
) -> str | None:
    """What a model calls a layer; None where it has it not."""
    return name_in(model, layer)


def has_valid_embedding_base_layer(layer: Any) -> bool:
    """Whether a layer with adapters sits on an embedding or on a linear layer."""
    return isinstance(getattr(layer, "base_layer", None), (nn.Linear, nn.Embedding))


def id_tensor_storage(tensor: Tensor) -> tuple[Any, int, int]:
    """(device, address, bytes) of the memory that a tensor is in: equal where two share it."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def check_adapters_to_merge(module: Any, adapter_names: list[str] | None = None) -> list[str]:
    """Those of the named adapters, the active ones by default, that are not merged."""
    if isinstance(adapter_names, str):
        raise ConfigError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    names = list(module.active_adapters if adapter_names is None else adapter_names)
    return [name for name in names if name not in module.merged_adapters]


def map_cache_to_layer_device_map(model: Any, cache: Any) -> None:
    """Moves what a cache holds of each layer to the device that the layer is on, where a base is spread by
    `device_map`."""
    places = getattr(model, "hf_device_map", None)
    held = getattr(cache, "self_attention_cache", cache)
    if places is None or not hasattr(held, "layers"):
        return
    by_layer = {
        int(part): device for name, device in places.items() for part in name.split(".") if part.isdigit()
    }
    for index, layer in enumerate(held.layers):
        device = by_layer.get(index, places.get(""))
        if device is not None and layer.keys is not None:
            layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)


def _set_trainable(*args: Any, **kwargs: Any) -> None:
    """HF PEFT's engine wraps modules by it; here adapters do by their configs."""
    raise ConfigError(
        "Name the modules in modules_to_save, or the tokens in trainable_token_indices, of a config."
    )


def _prepare_prompt_learning_config(*args: Any, **kwargs: Any) -> None:
    """HF PEFT fills in a prompt config's sizes by it; here they are filled in when the adapter is added."""
    raise ConfigError(
        "A prompt config's sizes are filled in by get_peft_model and add_adapter; read them after that."
    )
