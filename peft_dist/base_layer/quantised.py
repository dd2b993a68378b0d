"""Doors to bitsandbytes' Linear8bitLt and Linear4bit (LLM.int8(): arXiv 2208.07339; QLoRA: arXiv 2305.14314).

W is what the codes stand for: codes x scale of the row / 127 in 8-bit, the code's level x the scale of its
block in 4-bit. A change is added to that in fp32 and the sum is quantised anew, so a merged weight is exactly
quantise(dequantise(W) + dW). What is kept at a merge are the codes and scales themselves.

On CPUs with AVX512-BF16 bitsandbytes repacks a 4-bit weight in the first forward in eval mode and rounds its
scales to bf16 for good. A layer that gets an adapter is kept from that, so that training and evaluating, in
whatever order, see one weight; one that was repacked before is laid out again from what is left.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_dist.base_layer.layer import Layer
from peft_dist.lazy import lazy
from peft_dist.sharding import gathered, whole_shape

bitsandbytes = lazy("bitsandbytes")


def is_8bit(kind: type[nn.Module]) -> bool:
    """Whether it is bitsandbytes' Linear8bitLt; does not import bitsandbytes."""
    return _is_named(kind, "Linear8bitLt")


def is_4bit(kind: type[nn.Module]) -> bool:
    """Whether it is bitsandbytes' Linear4bit; does not import bitsandbytes."""
    return _is_named(kind, "Linear4bit")


def _is_named(kind: type, name: str) -> bool:
    return any(k.__name__ == name and k.__module__.startswith("bitsandbytes.") for k in kind.__mro__)


def num_elements(parameter: Any) -> int:
    """How many numbers a parameter stands for: a partitioned one's all, two for each byte of a packed 4-bit
    one."""
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

    def tensor(self, key: str) -> Tensor:
        if key != self.key:
            return super().tensor(key)
        with torch.no_grad(), gathered([self.layer.weight]):
            return self._dequantised()

    def apply(self, W: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, W)

    def _add(self, key: str, change: Tensor) -> None:
        if key != self.key or self.layer.weight.is_meta:
            super()._add(key, change)
            return
        with torch.no_grad(), gathered([self.layer.weight], modify=True):
            W = self._dequantised().float()
            self._quantise(W + change.to(W.device, torch.float32))

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

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__(layer, name)
        _quiet()

    @property
    def dtype(self) -> torch.dtype:
        # bitsandbytes quantises and multiplies in half precision.
        return torch.float16

    def adopt(self) -> None:
        weight = self.layer.weight
        if self._has_codes() or weight.has_fp16_weights or weight.is_meta:
            return
        # Its first forward would do the same.
        self._quantise(weight.data)

    def stored(self) -> dict[str, Any]:
        kept = super().stored()
        if self._has_codes():
            kept["scales"] = self._scales().clone()
        return kept

    def restore_(self, stored: Mapping[str, Any]) -> None:
        super().restore_({key: bits for key, bits in stored.items() if key != "scales"})
        if "weight" in stored:
            self._set(self.layer.weight.data, stored.get("scales"))

    def _has_codes(self) -> bool:
        return self.layer.weight.dtype == torch.int8

    def _scales(self) -> Tensor:
        scales = self.layer.weight.SCB
        return self.layer.state.SCB if scales is None else scales

    def _dequantised(self) -> Tensor:
        weight = self.layer.weight
        if weight.is_meta:
            return torch.empty(self.shape, device="meta")
        if self._has_codes():
            codes, scales = weight.data, self._scales()
        elif weight.has_fp16_weights:
            return weight.detach()
        else:
            codes, scales = _int8(weight.data)
        return bitsandbytes.functional.int8_vectorwise_dequant(codes, scales.to(codes.device))

    def _quantise(self, W: Tensor) -> None:
        weight = self.layer.weight
        if weight.has_fp16_weights:
            weight.data.copy_(W)
            self._set(weight.data, None)
        else:
            self._set(*_int8(W))

    def _set(self, data: Tensor, scales: Tensor | None) -> None:
        layer, weight = self.layer, self.layer.weight
        weight.data = data
        layer.state.reset_grads()
        if scales is not None:
            # As after `.to`: the next forward hands both on to the state.
            weight.CB, weight.SCB = weight.data, scales


class Linear4bitLayer(QuantisedLayer):
    """bitsandbytes' Linear4bit: nf4 or fp4 codes in blocks, whose scales may be quantised once more."""

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.compute_dtype or torch.float32

    def adopt(self) -> None:
        layer = self.layer
        layer.support_avx512bf16_for_cpu = False
        state = self._state()
        if state is None or not getattr(state, "packing_format_for_cpu", False):
            return
        self._set(*_laid_out(layer.weight.data, state))

    def stored(self) -> dict[str, Any]:
        return {**super().stored(), "quant_state": copy.deepcopy(self._state())}

    def restore_(self, stored: Mapping[str, Any]) -> None:
        rest = {key: bits for key, bits in stored.items() if key not in ("weight", "quant_state")}
        super().restore_(rest)
        if "weight" in stored:
            state = copy.deepcopy(stored["quant_state"])
            device = self.layer.weight.device
            if state is not None:
                state.to(device)
            self._set(stored["weight"].to(device, copy=True), state)

    def _state(self) -> Any:
        """The scales and what belongs to them; None before the weight is quantised."""
        state = getattr(self.layer.weight, "quant_state", None)
        return self.layer.quant_state if state is None else state

    def _dequantised(self) -> Tensor:
        weight, state = self.layer.weight.data, self._state()
        if weight.is_meta:
            return torch.empty(self.shape, device="meta")
        if state is None:
            return weight.detach()
        if getattr(state, "packing_format_for_cpu", False):
            weight, state = _laid_out(weight, state)
        return bitsandbytes.functional.dequantize_4bit(weight, state)

    def _quantise(self, W: Tensor) -> None:
        weight, state = self.layer.weight, self._state()
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
        self._set(data, made)

    def _set(self, data: Tensor, state: Any) -> None:
        layer, weight = self.layer, self.layer.weight
        weight.data = data
        weight.quant_state = layer.quant_state = state


def _int8(W: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (out, in) of W and the scale (out,) of each row."""
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(W.contiguous().to(torch.float16))
    return codes, scales


def _laid_out(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Codes and scales that bitsandbytes repacked for a CPU's own kernel, as they are everywhere else. The
    scales are what that kernel multiplies with: rounded to bf16 when it repacked them."""
    functional = bitsandbytes.functional
    scales = state.absmax
    codes_only = copy.copy(state)
    codes_only.original_nested = False
    codes, _ = functional._convert_weight_packed_for_cpu_inverse(packed, codes_only)
    made = functional.QuantState(
        absmax=scales.T.flatten().float(),
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.original_dtype,
    )
    return codes, made


class _Quiet(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


_QUIET = _Quiet()


def _quiet() -> None:
    """Lets bitsandbytes multiply fp32 without saying at each call that it casts to fp16."""
    # A filter that is there already is not added again.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_QUIET)
