"""Doors to bitsandbytes' Linear8bitLt and Linear4bit (LLM.int8(): arXiv 2208.07339; QLoRA: arXiv 2305.14314).

W is what the codes stand for: codes x scale of the row / 127 in 8-bit, the code's level x the scale of its
block in 4-bit. A change is added to that in fp32 and the sum is quantised anew, so a merged weight is exactly
quantise(dequantise(W) + dW). What is kept at a merge are the codes and scales themselves, a rank's pieces of
them where they are partitioned.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_dist import packed
from peft_dist.base_layer.layer import Layer
from peft_dist.lazy import lazy
from peft_dist.resting import RestingLinear
from peft_dist.sharding import gathered, is_partitioned, partition_like, stored_bits, whole_shape

bitsandbytes = lazy("bitsandbytes")


def num_elements(parameter: Any) -> int:
    """How many numbers of the model a parameter stands for: a partitioned one's all, two for each byte of a
    packed 4-bit one, none where it holds scales of codes."""
    if packed.is_statistic(parameter):
        return 0
    stored = whole_shape(parameter).numel()
    is_packed = type(parameter).__name__ == "Params4bit" and parameter.bnb_quantized
    return stored * 2 * parameter.element_size() if is_packed else stored


class QuantisedLayer(Layer):
    """A linear layer whose weight is stored as codes and scales."""

    kind = "linear"
    is_quantised = True

    def _matrix_shape(self) -> tuple[int, int]:
        # The stored shape is the packed one.
        return self.layer.out_features, self.layer.in_features

    def _tensors(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        shape = (self.layer.out_features, self.layer.in_features)
        bias = (("bias", (self.layer.out_features,)),) if self.layer.bias is not None else ()
        return (("weight", shape), *bias)

    def adopt(self) -> None:
        packed.settle(self.layer)

    def tensor(self, key: str) -> Tensor:
        if key != self.key:
            return super().tensor(key)
        with torch.no_grad(), gathered(self._stored_in()):
            return self._dequantised()

    def stored(self) -> dict[str, Any]:
        packed.follow_the_weight(self.layer)
        parts = packed.statistics(self.layer)
        return {**super().stored(), **{key: stored_bits(part) for key, part in parts.items()}}

    def _stored_in(self) -> list[Any]:
        """The parameters that hold W."""
        packed.follow_the_weight(self.layer)
        return [self.layer.weight, *packed.statistics(self.layer).values()]

    def apply(self, W: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, W)

    def _add(self, key: str, change: Tensor) -> None:
        if key != self.key or self.layer.weight.is_meta:
            super()._add(key, change)
            return
        with torch.no_grad(), gathered(self._stored_in(), modify=True):
            W = self._dequantised().float()
            self._quantise(W + change.to(W.device, torch.float32))

    @torch.no_grad()
    def make_dense(self, dtype: torch.dtype, dW: Tensor | None = None) -> Callable[[], None]:
        """Turns the layer into an nn.Linear of W + dW, added in fp32 and rounded once to `dtype`, in place; a
        collective if it is partitioned, as the nn.Linear then is. This door does not fit it any more.

        Returns:
            what turns it back, bit for bit.
        """
        layer, W = self.layer, self.weight().float()
        if dW is not None:
            W = W + dW.to(W.device, torch.float32)
        made = {"weight": W.to(dtype, copy=True)}
        if (bias := self.bias()) is not None:
            made["bias"] = bias.to(dtype, copy=True)
        before = (layer.__class__, dict(layer._parameters), packed.taken_off(layer))
        codes = layer.weight
        layer.__class__ = RestingLinear if is_partitioned(codes) else nn.Linear
        layer._parameters.clear()
        for key in ("weight", "bias"):
            parameter = nn.Parameter(made[key], requires_grad=False) if key in made else None
            layer.register_parameter(key, parameter)
            if parameter is not None:
                partition_like(parameter, codes)

        def turn_back() -> None:
            kind, parameters, attributes = before
            layer.__class__ = kind
            layer._parameters.clear()
            for key, parameter in parameters.items():
                layer.register_parameter(key, parameter)
            layer.__dict__.update(attributes)

        return turn_back

    @contextlib.contextmanager
    def substituted(self, W: Tensor, b: Tensor | None = None) -> Iterator[None]:
        """As `Layer.substituted`: the layer runs dense, in its input's dtype."""
        bias = self.layer.bias if b is None else b

        def dense(x: Tensor) -> Tensor:
            return F.linear(x, W.to(x.dtype), None if bias is None else bias.to(x.dtype))

        self.layer.forward = dense
        try:
            yield
        finally:
            del self.layer.forward

    def _dequantised(self) -> Tensor:
        raise NotImplementedError

    def _quantise(self, W: Tensor) -> None:
        raise NotImplementedError


class Linear8bitLayer(QuantisedLayer):
    """bitsandbytes' Linear8bitLt: int8 codes, one scale a row. Codes and scales hang on the weight until the
    first forward, and on the layer's `state` from then on."""

    @property
    def dtype(self) -> torch.dtype:
        # bitsandbytes quantises and multiplies in half precision.
        return torch.float16

    def stored(self) -> dict[str, Any]:
        kept = super().stored()
        if self._has_codes() and "SCB" not in kept:
            kept["scales"] = packed.scales_8bit(self.layer).clone()
        return kept

    def restore_(self, stored: Mapping[str, Any]) -> None:
        super().restore_({key: bits for key, bits in stored.items() if key != "scales"})
        if "weight" in stored and "SCB" not in stored:
            packed.set_8bit(self.layer, self.layer.weight.data, stored.get("scales"))

    def _has_codes(self) -> bool:
        return self.layer.weight.dtype == torch.int8

    def _dequantised(self) -> Tensor:
        weight = self.layer.weight
        if weight.is_meta:
            return torch.empty(self.shape, device="meta")
        if self._has_codes():
            codes, scales = weight.data, packed.scales_8bit(self.layer)
        elif weight.has_fp16_weights:
            return weight.detach()
        else:
            codes, scales = packed.int8(weight.data)
        return bitsandbytes.functional.int8_vectorwise_dequant(codes, scales.to(codes.device))

    def _quantise(self, W: Tensor) -> None:
        weight = self.layer.weight
        if weight.has_fp16_weights:
            weight.data.copy_(W)
            packed.set_8bit(self.layer, weight.data, None)
        else:
            packed.set_8bit(self.layer, *packed.int8(W))


class Linear4bitLayer(QuantisedLayer):
    """bitsandbytes' Linear4bit: nf4 or fp4 codes in blocks, whose scales may be quantised once more."""

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.compute_dtype or torch.float32

    def stored(self) -> dict[str, Any]:
        kept = super().stored()
        if "absmax" not in kept:
            kept["quant_state"] = copy.deepcopy(packed.quant_state(self.layer))
        return kept

    def restore_(self, stored: Mapping[str, Any]) -> None:
        if "quant_state" not in stored:
            super().restore_(stored)
            return
        rest = {key: bits for key, bits in stored.items() if key not in ("weight", "quant_state")}
        super().restore_(rest)
        if "weight" in stored:
            state = copy.deepcopy(stored["quant_state"])
            device = self.layer.weight.device
            if state is not None:
                state.to(device)
            packed.set_4bit(self.layer, stored["weight"].to(device, copy=True), state)

    def _dequantised(self) -> Tensor:
        weight, state = self.layer.weight.data, packed.quant_state(self.layer)
        if weight.is_meta:
            return torch.empty(self.shape, device="meta")
        if state is None:
            return weight.detach()
        if getattr(state, "packing_format_for_cpu", False):
            weight, state = packed.laid_out(weight, state)
        return bitsandbytes.functional.dequantize_4bit(weight, state)

    def _quantise(self, W: Tensor) -> None:
        weight, state = self.layer.weight, packed.quant_state(self.layer)
        if state is None:
            weight.data.copy_(W)
            return
        data, made = bitsandbytes.functional.quantize_4bit(
            W.contiguous(),
            blocksize=state.blocksize,
            compress_statistics=bool(weight.compress_statistics),
            quant_type=state.quant_type,
            quant_storage=weight.quant_storage,
        )
        # What the weight counts as is what it was loaded in, not fp32, in which the sum was made.
        made.dtype = state.dtype
        packed.set_4bit(self.layer, data, made)
