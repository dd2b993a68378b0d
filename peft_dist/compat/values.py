"""Constants of HF PEFT that programs read."""

from __future__ import annotations

from typing import Any

import torch

from peft_dist.catalog import METHODS, PeftType, mixes
from peft_dist.checkpoint import PICKLED_NAME
from peft_dist.checkpoint import WEIGHTS_NAME as _SAFETENSORS
from peft_dist.targets import ALL_LINEAR, HEAD_NAMES, MANY

WEIGHTS_NAME = PICKLED_NAME
SAFETENSORS_WEIGHTS_NAME = _SAFETENSORS
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
INCLUDE_LINEAR_LAYERS_SHORTHAND = ALL_LINEAR
DUMMY_TARGET_MODULES = "dummy-target-modules"
MIN_TARGET_MODULES_FOR_OPTIMIZATION = MANY
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UPCAST_DTYPES = (torch.float16, torch.bfloat16)
COMPATIBLE_TUNER_TYPES = tuple(PeftType[name] for name in METHODS if mixes(name))
assert set(SEQ_CLS_HEAD_NAMES) < set(HEAD_NAMES)


def bloom_model_postprocess_past_key_value(past_key_values: Any) -> Any:
    """Keys and values of a prefix in Bloom's older layout: keys (batch x heads, width, tokens), values
    (batch x heads, tokens, width)."""
    stacked = torch.cat(tuple(past_key_values))
    layers, batch, heads, tokens, width = stacked.shape
    keys = stacked[: layers // 2].transpose(2, 3).reshape(layers // 2, batch * heads, width, tokens)
    values = stacked[layers // 2 :].reshape(layers // 2, batch * heads, tokens, width)
    return tuple(zip(keys, values, strict=True))


def starcoder_model_postprocess_past_key_value(past_key_values: Any) -> Any:
    """Keys and values of a prefix in StarCoder's older layout: (batch, tokens, 2 x width) a layer, from
    (2, batch, heads, tokens, width)."""
    return tuple(layer[:, :, 0].permute(1, 2, 0, 3).flatten(2) for layer in past_key_values)


# Bases of this version of transformers take a prefix as it is.
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}

# This package needs a later version than those that are asked for.
is_transformers_ge_v5 = is_transformers_ge_v5_1_0 = is_transformers_ge_v5_4_0 = True
is_transformers_ge_v5_6_0 = is_transformers_ge_v5_13_0 = is_transformers_ge_v5_17_0 = True
is_transformers_le_4_53 = False
