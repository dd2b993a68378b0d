"""A base on the meta device: its modules, without a value of its weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import initialization, modeling_utils
from transformers.quantizers import AutoHfQuantizer, base

from peft_dist.errors import BaseModelError
from peft_dist.packed import is_quantised

QUANTIZATIONS = ("int8", "nf4", "fp4")
OTHER = "another library's"


def quantisation(asked: Any) -> Any:
    """`asked` as transformers' BitsAndBytesConfig, or None for a base that is not quantised.

    Args:
        asked: None, "int8", "nf4", "fp4" (4-bit with double quantisation, stored as uint8), or such a config.

    Raises:
        BaseModelError: it is something else, or a config that quantises nothing.
    """
    if asked is None:
        return None
    if isinstance(asked, str):
        if asked not in QUANTIZATIONS:
            raise BaseModelError(
                f"load_base: quantization is {asked!r}; it is one of {', '.join(QUANTIZATIONS)}, or a "
                "transformers.BitsAndBytesConfig."
            )
        if asked == "int8":
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=asked, bnb_4bit_use_double_quant=True
        )
    if not isinstance(asked, transformers.BitsAndBytesConfig):
        raise BaseModelError(
            f"load_base: quantization is a {type(asked).__name__}; bases are quantised by bitsandbytes alone. Give "
            f"{', '.join(QUANTIZATIONS)}, or a transformers.BitsAndBytesConfig."
        )
    if not (asked.load_in_8bit or asked.load_in_4bit):
        raise BaseModelError(
            "load_base: quantization is a BitsAndBytesConfig with neither load_in_8bit nor load_in_4bit. Set one, "
            "or leave quantization out."
        )
    if asked.load_in_8bit and asked.llm_int8_has_fp16_weight:
        raise BaseModelError(
            "load_base: llm_int8_has_fp16_weight keeps the weights in half precision, so nothing would be "
            "quantised. Leave it out, or leave quantization out."
        )
    return asked


def stored_quantisation(config: Any) -> Any:
    """How the files of a base are quantised already: a BitsAndBytesConfig, OTHER where another library did it, None.

    Args:
        config: of the base, as it was read.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None or isinstance(stored, transformers.BitsAndBytesConfig):
        return stored
    facts = dict(stored) if isinstance(stored, Mapping) else stored.to_dict()
    is_bitsandbytes = facts.get("load_in_8bit") or facts.get("load_in_4bit")
    if facts.get("quant_method", "bitsandbytes") != "bitsandbytes" or not is_bitsandbytes:
        return OTHER
    return transformers.BitsAndBytesConfig.from_dict(facts)


def build(
    auto_class: Any,
    config: Any,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    quantization: Any = None,
    heads: bool = False,
) -> Any:
    """The model of `config` on the meta device, its linear layers replaced by bitsandbytes' where it is
    quantised.

    Args:
        heads: a task's new head, whatever the quantisation, stays as it is.
    """
    config = copy.deepcopy(config)
    with _empty(dtype):
        # A copy of what it is given is kept, since transformers writes into it.
        model = auto_class.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)
        if quantization is None:
            return model
        quantization = copy.deepcopy(quantization)
        if heads:
            quantization.llm_int8_skip_modules = _not_quantised(model, quantization.llm_int8_skip_modules)
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
    for layer in quantised_weights(model).values():
        if layer.bias is not None:
            layer.bias.requires_grad_(True)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model


def _not_quantised(model: Any, asked: Sequence[str] | None) -> list[str]:
    skipped = base.get_keys_to_not_convert(model) if asked is None else asked
    prefix = getattr(model, "base_model_prefix", "")
    heads = [name for name, _ in model.named_children() if name != prefix] if hasattr(model, prefix) else []
    return sorted({*skipped, *heads})


@contextlib.contextmanager
def _empty(dtype: torch.dtype) -> Iterator[None]:
    """Modules made within have no values, are not started, and tie no weights."""
    with (
        modeling_utils.local_torch_dtype(dtype),
        modeling_utils.set_zero3_state(),
        initialization.no_tie_weights(),
        torch.device("meta"),
        initialization.meta_device_safe_creation_ops(),
    ):
        yield


def quantised_weights(model: nn.Module) -> dict[str, nn.Module]:
    """The bitsandbytes layers of a model by the names of their weights."""
    return {f"{name}.weight": module for name, module in model.named_modules() if is_quantised(module)}
