"""Bases whose files hold bitsandbytes' codes: the sizes of the weights that they stand for, and how they are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..spec.quantization import Quantization

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name -> (safetensors dtype, shape)."""

_STATE = ".quant_state.bitsandbytes__"
_COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_LABELS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def quantization_in(config: Mapping[str, Any]) -> Quantization | None:
    """How a base's files are quantised by bitsandbytes already, by its config.json; None where they are not."""
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping) or stored.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return None
    if stored.get("load_in_8bit"):
        return Quantization(8)
    if not stored.get("load_in_4bit"):
        return None
    return Quantization(
        4,
        str(stored.get("bnb_4bit_quant_type", "fp4")),
        bool(stored.get("bnb_4bit_use_double_quant", False)),
        str(stored.get("bnb_4bit_compute_dtype", "float32")),
        str(stored.get("bnb_4bit_quant_storage", "uint8")),
    )


def dequantised(tensors: Tensors, own_dtype: str, read: Callable[[str], bytes]) -> Tensors:
    """The tensors of a base as they are where nothing is quantised.

    Args:
        own_dtype: of the weights that 8-bit codes stand for, as safetensors call it.
        read: gives the bytes of a small tensor. It is asked once for layers that are alike in name and size, since
            each question may be one to a server.
    """
    found = dict(tensors)
    alike: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]] = {}
    for key, (dtype, shape) in tensors.items():
        weight, is_state, _ = key.partition(_STATE)
        layer, _, leaf = key.rpartition(".")
        if is_state and weight in tensors:
            kind = re.sub(r"\d+", "#", weight), tensors[weight][1]
            if kind not in alike:
                facts = json.loads(read(key))
                alike[kind] = _LABELS.get(facts["dtype"], "F32"), tuple(facts["shape"])
            found[weight] = alike[kind]
            for name in (key, *(weight + each for each in _COMPANIONS)):
                found.pop(name, None)
        elif leaf == "weight" and dtype == "I8" and f"{layer}.SCB" in tensors:
            found[key] = own_dtype, shape
            for name in ("SCB", "weight_format"):
                found.pop(f"{layer}.{name}", None)
    return found
