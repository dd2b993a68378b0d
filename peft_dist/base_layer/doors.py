"""Which door belongs to which layer."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_dist.base_layer.attention import AttentionLayer
from peft_dist.base_layer.convolution import KINDS, ConvLayer
from peft_dist.base_layer.layer import Layer
from peft_dist.base_layer.linear import Conv1DLayer, EmbeddingLayer, LinearLayer
from peft_dist.base_layer.quantised import Linear4bitLayer, Linear8bitLayer
from peft_dist.errors import BaseLayerError
from peft_dist.packed import is_4bit, is_8bit

DOORS: tuple[tuple[type[nn.Module], type[Layer]], ...] = (
    (Conv1D, Conv1DLayer),
    (nn.Linear, LinearLayer),
    (nn.Embedding, EmbeddingLayer),
    (nn.Conv1d, ConvLayer),
    (nn.Conv2d, ConvLayer),
    (nn.Conv3d, ConvLayer),
    (nn.MultiheadAttention, AttentionLayer),
)


@functools.cache
def _door_of(kind: Any) -> type[Layer] | None:
    if is_8bit(kind):
        return Linear8bitLayer
    if is_4bit(kind):
        return Linear4bitLayer
    return next((opened for fits, opened in DOORS if issubclass(kind, fits)), None)


def has_door(layer: nn.Module) -> bool:
    """Whether an adapter can change the weight of such a layer."""
    kind: Any = type(layer)
    return _door_of(kind) is not None


def kind_of(layer: Any) -> str:
    """What `Site.kind` of such a layer is."""
    kind: Any = type(layer)
    opened = _door_of(kind)
    if opened is None:
        return "module"
    return KINDS[len(layer.kernel_size)] if opened is ConvLayer else opened.kind


def door(layer: nn.Module, name: str) -> Layer:
    """The door to the weight matrix of `layer`.

    Raises:
        BaseLayerError: a layer of this kind has no weight matrix that an adapter could change.
    """
    kind: Any = type(layer)
    opened = _door_of(kind)
    if opened is None:
        raise BaseLayerError(
            f"{name}: a {type(layer).__name__} cannot be adapted; Linear, Conv1D, Embedding, Conv1d, Conv2d, "
            "Conv3d and MultiheadAttention can. Name other layers, or train it whole by modules_to_save."
        )
    return opened(layer, name)
