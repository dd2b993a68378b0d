"""Doors to layers that are one product: nn.Linear, HF's Conv1D, and nn.Embedding as a product with one-hot
rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_dist.base_layer.layer import Layer
from peft_dist.errors import BaseLayerError
from peft_dist.sharding import whole_shape


class LinearLayer(Layer):
    """nn.Linear."""

    kind = "linear"

    def __init__(self, layer: nn.Module, name: str) -> None:
        _refuse_codes(layer, name)
        super().__init__(layer, name)

    def _matrix_shape(self) -> tuple[int, int]:
        out, in_ = whole_shape(self.layer.weight)
        return out, in_

    def apply(self, W: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, W)


class Conv1DLayer(Layer):
    """HF's Conv1D: a linear layer whose weight is stored (in, out)."""

    kind = "linear"

    def _matrix_shape(self) -> tuple[int, int]:
        in_, out = whole_shape(self.layer.weight)
        return out, in_

    def apply(self, W: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, W)

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return stored.T

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T


class EmbeddingLayer(Layer):
    """nn.Embedding: in is the vocabulary, out the width, the weight stored (in, out); x are token ids."""

    kind = "embedding"

    def __init__(self, layer: nn.Module, name: str) -> None:
        _refuse_codes(layer, name)
        super().__init__(layer, name)

    def _matrix_shape(self) -> tuple[int, int]:
        # Not by its attribute: a forward may be running, in which that gathers a partitioned weight.
        weight = self.parameter
        in_, out = whole_shape(self.layer.weight if weight is None else weight)
        return out, in_

    def apply(self, W: Tensor, x: Tensor) -> Tensor:
        layer = self.layer
        y = F.embedding(
            x, W.T, layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq, layer.sparse
        )
        return self._scaled(y)

    def as_given(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Vectors (..., width) of a table, those of `ids`, as the layer gives them, padding without gradient."""
        if self.layer.padding_idx is not None:
            rows = torch.where((ids == self.layer.padding_idx)[..., None], rows.detach(), rows)
        return self._scaled(rows)

    def _scaled(self, y: Tensor) -> Tensor:
        """Gemma scales what the table gives."""
        scale = getattr(self.layer, "embed_scale", None)
        return y if scale is None else y * scale.to(y.dtype) if isinstance(scale, Tensor) else y * scale

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return stored.T

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T


def _refuse_codes(layer: nn.Module, name: str) -> None:
    weight = layer._parameters.get("weight")
    if weight is not None and not weight.is_floating_point():
        raise BaseLayerError(
            f"{name}: a {type(layer).__name__} whose weight is stored as {weight.dtype}. Of quantised layers "
            "only bitsandbytes' Linear8bitLt and Linear4bit can be adapted; load the base in one of those."
        )
