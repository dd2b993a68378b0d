"""Embeddings of the base that travel with an adapter."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.nn import Parameter

from peft_dist.adapted.around import Around
from peft_dist.errors import AdapterWarning
from peft_dist.inject import asked
from peft_dist.methods.replace.trainable_tokens import TokenRows
from peft_dist.pooled import PooledModule, name_in, outer_modules

_EMBEDDING_NAMES = ("embed_tokens", "lm_head")


def all_embeddings(model: Any) -> dict[str, Parameter]:
    """The weights of the base's input and output embeddings, by their names in a checkpoint."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        layer = asked(base, getter)
        while (inner := getattr(layer, "base_layer", None)) is not None:
            layer = inner
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Parameter):
            path = name_in(model, layer)
            if path is not None:
                found[f"{_unreplaced(path)}.weight"] = weight
    return found


def embeddings_of(model: nn.Module, adapter_name: str, wish: bool | Literal["auto"]) -> dict[str, Parameter]:
    """Those that are saved with the adapter, by their names in a checkpoint."""
    if wish is False:
        return {}
    embeddings = all_embeddings(model)
    adapted = {
        f"{_unreplaced(path)}.base_layer.weight"
        for path, module in outer_modules(model)
        if isinstance(module, PooledModule)
        and not isinstance(module, Around)
        and adapter_name in module.adapters
        and _unreplaced(path).rpartition(".")[2] in _EMBEDDING_NAMES
        and not _trains_rows(module, adapter_name)
        and not _is_made_elsewhere(module, adapter_name)
    }
    targeted = {key: parameter for key, parameter in embeddings.items() if key in adapted}
    if targeted:
        if wish == "auto":
            _say("embedding layers found in `target_modules`.")
        return targeted
    if wish is True:
        if not embeddings:
            warnings.warn(
                "save_embedding_layers is True, but the base does not tell its embeddings "
                "(get_input_embeddings, as transformers' models have it): none are saved.",
                AdapterWarning,
                stacklevel=4,
            )
        return embeddings
    if _is_resized(model, adapter_name):
        _say("the embedding layer has been resized during finetuning.")
        return embeddings
    return {}


def _unreplaced(path: str) -> str:
    """A layer's name as if no adapter put a module of its own around it. The module itself in whose place one stands
    keeps its own: the plain name is the trained copy's in a file."""
    return path.replace(".original_module.", ".")


def _say(why: str) -> None:
    warnings.warn(f"Setting `save_embedding_layers` to `True` as {why}", stacklevel=4)


def _trains_rows(module: Any, adapter_name: str) -> bool:
    """Whether all that the adapter has on an embedding is rows of it, so that a file need not hold the rest."""
    return isinstance(getattr(module, "methods", {}).get(adapter_name), TokenRows)


def _is_made_elsewhere(module: PooledModule, adapter_name: str) -> bool:
    """Whether nothing that the adapter has there is in its file."""
    wanted = module.wanted(adapter_name).values()
    return bool(wanted) and not any(param.persistent for param in wanted)


def _is_resized(model: nn.Module, adapter_name: str) -> bool:
    """Whether the base's vocabulary differs from the one in its directory; false where that cannot be
    seen."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    base_path = getattr(config, "base_model_name_or_path", None)
    here = getattr(getattr(model, "config", None), "vocab_size", None)
    if not base_path or here is None or not (Path(base_path) / "config.json").is_file():
        return False
    stored = json.loads((Path(base_path) / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    return stored is not None and stored != here
