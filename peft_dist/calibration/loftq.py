"""LoftQ on a base that is quantised already: LoRA's factors from what the quantisation lost of each weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_dist.adapted import Adapted
from peft_dist.calibration.filled import check_filled
from peft_dist.errors import BaseModelError, ConfigError
from peft_dist.folder import is_hub_id, local_folder
from peft_dist.inject import adapter_modules
from peft_dist.methods.lora.loftq import principal
from peft_dist.packed import is_4bit

_FILE = "model.safetensors"
_INDEX = f"{_FILE}.index.json"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Starts an adapter anew on a 4-bit base: s B A are the principal directions of W - Q, layer by layer.

    Args:
        model_path: directory or hub id of the weights before they were quantised, or their safetensors file; the
            base's own name where None.
        callback: asked after each layer with the model and the layer's name; where it says False, the layer's
            factors are put back.

    Raises:
        ConfigError: no layer here is quantised, or the adapter is no LoRA on it.
        BaseModelError: the weights are not there, or lack a layer.
    """
    check_filled(peft_model, "replace_lora_weights_loftq")
    targets = [
        (name, module)
        for name, module in adapter_modules(peft_model.get_base_model())
        if isinstance(module, Adapted)
        and adapter_name in module.adapters
        and {"A", "B"} <= set(module.wanted(adapter_name))
        and is_4bit(type(module.base_layer))
    ]
    if not targets:
        raise ConfigError(
            f"replace_lora_weights_loftq: adapter {adapter_name!r} has LoRA on no 4-bit layer of this base. Load the "
            "base with a BitsAndBytesConfig(load_in_4bit=True)."
        )
    weights = _Weights(str(model_path or getattr(peft_model.get_base_model().config, "_name_or_path", "")))
    prefix = getattr(peft_model.get_base_model(), "base_model_prefix", "")
    for name, module in targets:
        p, base = module.tensors(adapter_name), module.base
        W = weights.tensor(f"{name}.weight", prefix).to(p["A"].device, torch.float32)
        root = module.methods[adapter_name].scaling(base.site) ** 0.5
        B, A = principal(W - base.weight().float(), module.methods[adapter_name].rank(base.site))
        before = {key: p[key].clone() for key in ("A", "B")}
        p["A"].copy_(A / root)
        p["B"].copy_(B / root)
        if callback is not None and not callback(peft_model, name):
            for key, value in before.items():
                p[key].copy_(value)


class _Weights:
    """Tensors by name from a file of safetensors, or from several with an index; one at a time."""

    def __init__(self, path: str) -> None:
        self.path = path
        folder = Path(path)
        if folder.suffix != ".safetensors" and is_hub_id(path):
            folder = local_folder(path, (_FILE, _INDEX, "*.safetensors"))
        self.files: dict[str, Path] = {}
        self.only = folder if folder.is_file() else folder / _FILE
        index = folder / _INDEX
        if not self.only.is_file() and index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.files = {key: folder / file for key, file in names.items()}
        elif not self.only.is_file():
            raise BaseModelError(
                f"replace_lora_weights_loftq: {path!r} has no {_FILE}. Name the directory of the weights as they were "
                "before they were quantised."
            )

    def tensor(self, name: str, prefix: str) -> Tensor:
        """The tensor of this name, with or without the base's prefix.

        Raises:
            BaseModelError: there is none.
        """
        for key in (name, name.removeprefix(f"{prefix}.")):
            try:
                with safe_open(self.files.get(key, self.only), framework="pt", device="cpu") as file:
                    return file.get_tensor(key)
            except (SafetensorError, OSError):
                continue
        raise BaseModelError(f"replace_lora_weights_loftq: {self.path!r} has no {name!r}.")
