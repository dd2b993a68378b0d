"""The door to nn.Conv1d, Conv2d and Conv3d, with any number of groups.

W is (out, channels of a group x kernel). A group's outputs see the channels of that group alone. A change may
also be *wide*: (out, all channels x kernel), which LoRA's is where groups > 1, since its A reads every
channel. A wide change that is merged makes the layer one of a single group; unmerging puts the groups back.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_dist.base_layer.layer import Layer
from peft_dist.contract import Kind
from peft_dist.errors import BaseLayerError
from peft_dist.sharding import is_partitioned, whole_shape

KINDS: dict[int, Kind] = {1: "conv1d", 2: "conv2d", 3: "conv3d"}
CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvLayer(Layer):
    """nn.Conv1d, Conv2d and Conv3d."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.kind = KINDS[len(layer.kernel_size)]  # type: ignore[arg-type]
        super().__init__(layer, name)

    def _matrix_shape(self) -> tuple[int, int]:
        out, *rest = whole_shape(self.layer.weight)
        return out, torch.Size(rest).numel()

    def _kernel(self) -> tuple[int, ...]:
        return tuple(self.layer.kernel_size)

    def apply(self, W: Tensor, x: Tensor) -> Tensor:
        """As `Layer.apply`; W may be wide, and then rows see every channel. Without it rows belong to the
        groups in equal parts, in order."""
        layer, groups = self.layer, self.site.groups if W.shape[1] == self.site.in_ else 1
        if W.shape[0] % groups:
            raise BaseLayerError(
                f"{self.site.name}: {W.shape[0]} rows cannot be shared out over the {groups} groups of this "
                "convolution. Choose a rank that the groups divide, or leave the layer out."
            )
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        return CONVOLVE[len(self.site.kernel)](
            x, self._as_stored(W), None, layer.stride, padding, layer.dilation, groups
        )

    def mix(self, M: Tensor, h: Tensor) -> Tensor:
        """As `Layer.mix`; M (rows, channels of a group) mixes each group's channels to its own rows."""
        channels = -1 - len(self.site.kernel)
        if M.shape[1] == h.shape[channels]:
            return F.linear(h.movedim(channels, -1), M).movedim(-1, channels)
        groups = self.site.groups
        parts = h.movedim(channels, -1).unflatten(-1, (groups, -1))
        mixed = torch.einsum("...gc,grc->...gr", parts, M.unflatten(0, (groups, -1)))
        return mixed.flatten(-2).movedim(-1, channels)

    def plus(self, W: Tensor, dW: Tensor) -> Tensor:
        if W.shape[1] != dW.shape[1]:
            W, dW = self.widened(W), self.widened(dW)
        return W + dW

    def widened(self, W: Tensor) -> Tensor:
        """W (out, channels of a group x kernel) over all channels: zero where an output sees none; a wide one
        as it is."""
        groups, in_ = self.site.groups, self.site.in_
        if groups == 1 or W.shape[1] != in_:
            return W
        wide = W.new_zeros(groups, W.shape[0] // groups, groups, in_)
        every = torch.arange(groups, device=W.device)
        wide[every, :, every] = W.unflatten(0, (groups, -1))
        return wide.flatten(2).flatten(0, 1)

    def add_(self, dW: Tensor) -> None:
        if dW.shape[1] != self.site.in_ and self.layer.groups > 1:
            self._ungroup()
        super().add_(self.widened(dW) if self.layer.groups != self.site.groups else dW)

    def restore_(self, stored: Mapping[str, Any]) -> None:
        weight = stored.get(self.key)
        if weight is not None and self.layer.groups != self.site.groups:
            self.layer.weight.data = torch.empty_like(weight)
            self.layer.groups = self.site.groups
        super().restore_(stored)

    def _ungroup(self) -> None:
        weight = self.layer.weight
        if is_partitioned(weight):
            raise BaseLayerError(
                f"{self.site.name}: the change of this adapter crosses the layer's {self.site.groups} groups, "
                "and its weight is partitioned by ZeRO-3, so it cannot be made one group. Merge on an "
                "unpartitioned base, or keep the adapter."
            )
        warnings.warn(
            f"{self.site.name}: the change crosses the layer's {self.site.groups} groups, so the merged layer "
            "has one group and a weight over all channels. A model saved so does not fit its architecture's "
            "config.",
            stacklevel=4,
        )
        weight.data = self._as_stored(self.widened(self._as_matrix(weight.data)))
        self.layer.groups = 1

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, (-1, *self.site.kernel))
