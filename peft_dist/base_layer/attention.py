"""The door to nn.MultiheadAttention's joint projection of query, key and value: W is (3 width, width).

Its output projection is a layer of its own inside it, whose weight the attention reads without calling it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_dist.base_layer.layer import Layer
from peft_dist.errors import BaseLayerError, RowsError
from peft_dist.rows import Cut, Rows, Segment
from peft_dist.sharding import whole_shape

OUT_PROJ = "out_proj"
_ARGUMENTS = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)


class AttentionLayer(Layer):
    """nn.MultiheadAttention whose query, key and value have one width."""

    kind = "mha"
    key = "in_proj_weight"
    # Biases of projections are trained by layers that are called `bias`; HF PEFT leaves this one alone.
    bias_key = ""
    is_argument = True

    def __init__(self, layer: nn.Module, name: str) -> None:
        if not layer._qkv_same_embed_dim:
            raise BaseLayerError(
                f"{name}: a MultiheadAttention with kdim or vdim unlike embed_dim keeps three projections "
                "apart; only one whose query, key and value have the same width can be adapted. Leave it out, "
                "or train it whole by modules_to_save."
            )
        super().__init__(layer, name)

    def _matrix_shape(self) -> tuple[int, int]:
        out, in_ = whole_shape(self.layer.in_proj_weight)
        return out, in_

    def apply(self, W: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, W)

    def cut(self, rows: Rows, length: int | None) -> Cut:
        return AttentionCut(rows, self.site, length, 0 if self.layer.batch_first else 1, self.layer.num_heads)


@dataclass(frozen=True)
class AttentionCut(Cut):
    """Calls of nn.MultiheadAttention, whose sequences stand on `axis`."""

    axis: int
    num_heads: int

    def of(self, tree: Any, segment: Segment) -> Any:
        args, kwargs = tree
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        # Once for each tensor: the attention sees by identity that query, key and value are one.
        done: dict[int, Tensor] = {}
        for name in ("query", "key", "value"):
            given[name] = done.setdefault(id(given[name]), self._part(given[name], self.axis, segment))
        mask = given.get("key_padding_mask")
        if mask is not None:
            given["key_padding_mask"] = self._part(mask, 0, segment)
        mask = given.get("attn_mask")
        if mask is not None and mask.ndim == 3:
            per_row = mask.unflatten(0, (-1, self.num_heads))
            given["attn_mask"] = self._part(per_row, 0, segment).flatten(0, 1)
        return (), given

    def joined(self, parts: Sequence[Any]) -> Any:
        outputs, weights = zip(*parts, strict=True)
        y = self._whole(outputs, self.axis)
        return y, None if weights[0] is None else self._whole(weights, 0)

    def _part(self, t: Tensor, axis: int, segment: Segment) -> Tensor:
        num = self.rows.num
        if t.ndim < 2 or (axis == 1 and t.ndim < 3) or t.shape[axis] != num:
            raise RowsError(
                f"{self.site.name}: its input has shape {tuple(t.shape)}, but the batch has {num} sequences, "
                f"which are to stand on axis {axis}. Rows cannot tell which adapter serves which part of it; "
                "run one adapter at a time."
            )
        order = self.rows.order
        chosen = range(segment.start, segment.stop) if order is None else order[segment.start : segment.stop]
        return t.index_select(axis, torch.tensor(list(chosen), device=t.device))

    def _whole(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        whole, order = torch.cat(list(parts), axis), self.rows.order
        if order is None:
            return whole
        back = torch.tensor(order, device=whole.device).argsort()
        return whole.index_select(axis, back)
