"""The one door to frozen weights: plain and ZeRO-3 partitioned ones, and weights on meta.

Whether a weight is partitioned is asked at each call, since a base may be partitioned before or after its
adapters are injected. Shapes come from the parameters' own sizes and never gather.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_dist.contract import Kind, Site
from peft_dist.errors import BaseLayerError
from peft_dist.sharding import gathered, restore_bits, stored_bits, whole_shape

CONVS: dict[int, Kind] = {1: "conv1d", 2: "conv2d", 3: "conv3d"}


class Layer:
    """Any module with a bias or with parameters to replace; the root of the doors below.

    Args:
        layer: the frozen module.
        name: its dotted name in the base.
    """

    kind: Kind = "module"
    # Whether the weight is used as a function's argument, so that an adapter acts by `substituted` alone.
    is_argument = False

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer: Any = layer
        out, in_ = self._matrix_shape()
        bias = getattr(layer, "bias", None)
        self.site = Site(
            name,
            out,
            in_,
            self.kind,
            self._kernel(),
            getattr(layer, "groups", 1),
            whole_shape(bias).numel() if isinstance(bias, Tensor) else 0,
            tuple((key, tuple(whole_shape(p))) for key, p in layer.named_parameters()),
        )

    def _matrix_shape(self) -> tuple[int, int]:
        return 0, 0

    def _kernel(self) -> tuple[int, ...]:
        return ()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.site.out, self.site.in_

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the layer computes in."""
        return next((p.dtype for p in self.layer.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where its weight lives; a partitioned weight's is where it is gathered."""
        return next((p.device for p in self.layer.parameters()), torch.device("cpu"))

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def tensor(self, key: str) -> Tensor:
        """The layer's parameter `key`, whole and detached; a collective if it is partitioned."""
        parameter = self.layer.get_parameter(key)
        # The alias outlives the context: DeepSpeed lets go of the gathered storage, it does not free it.
        with gathered([parameter]):
            return parameter.detach()

    def weight(self) -> Tensor:
        """W (out, in), whole and detached; a collective if it is partitioned."""
        return self._as_matrix(self.tensor("weight"))

    def bias(self) -> Tensor | None:
        """b (out,), whole and detached, or None; a collective if it is partitioned."""
        return self.tensor("bias") if self.site.bias else None

    def apply(self, W: Tensor, x: Tensor) -> Tensor:
        """The layer with W (rows, in) in place of its weight, without bias: x (..., in) -> (..., rows)."""
        raise BaseLayerError(
            f"{self.site.name}: a {type(self.layer).__name__} has no weight matrix to apply."
        )

    def mix(self, M: Tensor, h: Tensor) -> Tensor:
        """M (rows, channels) over the channels of h: (..., channels) -> (..., rows)."""
        return F.linear(h, M)

    def add_(self, dW: Tensor) -> None:
        """Adds dW (out, in) to the weight in place, in fp32, rounded once to the weight's dtype; a
        collective if it
        is partitioned: rank 0's result is what every rank keeps."""
        self._add("weight", self._as_stored(dW))

    def add_bias_(self, b: Tensor) -> None:
        """Adds b (out,) to the bias in place; a collective if it is partitioned.

        Raises:
            BaseLayerError: the layer has no bias.
        """
        if not self.site.bias:
            raise BaseLayerError(
                f"{self.site.name}: this layer has no bias to add to. Do not merge; keep the adapter."
            )
        self._add("bias", b)

    def stored(self) -> dict[str, Tensor]:
        """A copy of the stored bits of weight and bias, as `restore_` takes them: this rank's piece of a
        partitioned parameter, so nothing is gathered."""
        return {key: stored_bits(p) for key, p in self.layer.named_parameters(recurse=False)}

    def restore_(self, stored: dict[str, Tensor]) -> None:
        """Puts back bit for bit what `stored` returned."""
        for key, bits in stored.items():
            restore_bits(self.layer.get_parameter(key), bits)

    @contextlib.contextmanager
    def substituted(self, W: Tensor, b: Tensor | None = None) -> Iterator[None]:
        """Within the context the layer runs with W (out, in), and b (out,) where it is given; gradients flow
        to both."""
        taken = {"weight": self.layer._parameters.pop("weight")}
        self.layer.weight = self._as_stored(W)
        if b is not None and self.site.bias:
            taken["bias"] = self.layer._parameters.pop("bias")
            self.layer.bias = b
        try:
            yield
        finally:
            for key, parameter in taken.items():
                delattr(self.layer, key)
                self.layer._parameters[key] = parameter

    def _add(self, key: str, change: Tensor) -> None:
        parameter = self.layer.get_parameter(key)
        if parameter.is_meta:
            raise BaseLayerError(
                f"{self.site.name}.{key} is on the meta device: load the base before changing it."
            )
        with torch.no_grad(), gathered([parameter], modify=True):
            stored = parameter.data
            exact = torch.promote_types(stored.dtype, torch.float32)
            stored.copy_(stored.to(exact) + change.to(stored.device, exact))

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return stored

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return matrix


class LinearLayer(Layer):
    """nn.Linear."""

    kind = "linear"

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

    def _matrix_shape(self) -> tuple[int, int]:
        in_, out = whole_shape(self.layer.weight)
        return out, in_

    def apply(self, W: Tensor, x: Tensor) -> Tensor:
        layer = self.layer
        y = F.embedding(
            x, W.T, layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq, layer.sparse
        )
        # Gemma scales what the table gives.
        scale = getattr(layer, "embed_scale", None)
        return y if scale is None else y * scale.to(y.dtype) if isinstance(scale, Tensor) else y * scale

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return stored.T

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T


class ConvLayer(Layer):
    """nn.Conv1d, Conv2d and Conv3d with one group; in = channels x kernel."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        if layer.groups != 1:
            raise BaseLayerError(
                f"{name}: a convolution with {layer.groups} groups; only one group can be adapted."
            )
        self.kind = CONVS[len(layer.kernel_size)]  # type: ignore[arg-type]
        super().__init__(layer, name)

    def _matrix_shape(self) -> tuple[int, int]:
        out, *rest = whole_shape(self.layer.weight)
        return out, torch.Size(rest).numel()

    def _kernel(self) -> tuple[int, ...]:
        return tuple(self.layer.kernel_size)

    def apply(self, W: Tensor, x: Tensor) -> Tensor:
        return self.layer._conv_forward(x, self._as_stored(W), None)

    def mix(self, M: Tensor, h: Tensor) -> Tensor:
        channels = -1 - len(self.site.kernel)
        return F.linear(h.movedim(channels, -1), M).movedim(-1, channels)

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, (-1, *self.site.kernel))


DOORS: tuple[tuple[type[nn.Module], type[Layer]], ...] = (
    (Conv1D, Conv1DLayer),
    (nn.Linear, LinearLayer),
    (nn.Embedding, EmbeddingLayer),
    (nn.Conv1d, ConvLayer),
    (nn.Conv2d, ConvLayer),
    (nn.Conv3d, ConvLayer),
)


def has_door(layer: nn.Module) -> bool:
    """Whether an adapter can change the weight of such a layer."""
    return isinstance(layer, tuple(kind for kind, _ in DOORS))


def door(layer: nn.Module, name: str) -> Layer:
    """The door to the weight matrix of `layer`.

    Raises:
        BaseLayerError: a layer of this kind has no weight matrix that an adapter could change.
    """
    for kind, opened in DOORS:
        if isinstance(layer, kind):
            return opened(layer, name)
    raise BaseLayerError(
        f"{name}: a {type(layer).__name__} cannot be adapted; Linear, Conv1D, Embedding, Conv1d, Conv2d "
        "and Conv3d "
        "can. Name other layers, or train it whole by modules_to_save."
    )
