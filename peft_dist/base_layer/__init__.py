"""The one door to frozen weights, whatever their kind and storage: plain, quantised, ZeRO-3 partitioned, on
meta."""

from peft_dist.base_layer.attention import OUT_PROJ
from peft_dist.base_layer.doors import door, has_door, kind_of
from peft_dist.base_layer.experts import ParameterLayer
from peft_dist.base_layer.layer import Layer, rounded
from peft_dist.base_layer.linear import Conv1DLayer, EmbeddingLayer, LinearLayer
from peft_dist.base_layer.quantised import QuantisedLayer, num_elements

__all__ = [
    "OUT_PROJ",
    "Conv1DLayer",
    "EmbeddingLayer",
    "Layer",
    "LinearLayer",
    "ParameterLayer",
    "QuantisedLayer",
    "door",
    "has_door",
    "kind_of",
    "num_elements",
    "rounded",
]
