"""One base, stored in each way of the matrix, as transformers loads it; fresh at every call."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers.utils import logging

from peft_dist.loading import load_base, meta_base
from tests.distributed import one_process as run

# Computing in fp32, so that what remains of a difference is a mistake and not rounding.
_NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
_QUANTISATION: dict[str, Callable[[], BitsAndBytesConfig]] = {
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "nf4": lambda: BitsAndBytesConfig(**_NF4),
    "nf4 in floats": lambda: BitsAndBytesConfig(**_NF4, bnb_4bit_quant_storage=torch.float32),
}


@functools.cache
def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="matrix-base-")
    # Large enough for gradients to stand out of bf16's rounding.
    base = run.base(initializer_range=0.3)
    del base.first
    base.float().save_pretrained(folder)
    return folder


def dtype_of(storage: str) -> torch.dtype:
    """The dtype of the parameters that are not quantised."""
    return torch.bfloat16 if storage == "bf16" else torch.float32


@functools.cache
def prepared(storage: str) -> LlamaForCausalLM:
    """The base, loaded once; processes forked afterwards find it there."""
    logging.disable_progress_bar()
    more: dict[str, Any] = {}
    if storage in _QUANTISATION:
        more = {"quantization_config": _QUANTISATION[storage](), "device_map": {"": "cpu"}}
    model = LlamaForCausalLM.from_pretrained(_folder(), dtype=dtype_of(storage), **more)
    model.config.use_cache = False
    return model


def base(storage: str) -> LlamaForCausalLM:
    """A base of its own, in train mode, as transformers loads it."""
    return copy.deepcopy(prepared(storage)).train()


def on_meta(storage: str) -> LlamaForCausalLM:
    """The base without values, for `fill`."""
    model = meta_base(_folder(), dtype=dtype_of(storage), quantization=_quantisation(storage))
    model.config.use_cache = False
    return model.train()


def fill(model: Any, storage: str, deepspeed: Mapping[str, Any] | None) -> None:
    """Gives a base on meta its values, partitioned where a config for that is given."""
    load_base(
        _folder(),
        dtype=dtype_of(storage),
        quantization=_quantisation(storage),
        zero_stage=0 if deepspeed is None else 3,
        deepspeed=deepspeed,
        into=model,
    )


def _quantisation(storage: str) -> BitsAndBytesConfig | None:
    return _QUANTISATION[storage]() if storage in _QUANTISATION else None
