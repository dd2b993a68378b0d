"""bitsandbytes' quantised linear layers: what they store, kept steady, and in a form that can be partitioned.

bitsandbytes keeps a layer's codes and statistics wherever its kernels want them: int8 codes move from the
weight to `state.CB`, which ZeRO-3 does not know; 4-bit statistics hang on an attribute of the weight. A layer
that is made partitionable has each of its tensors as a frozen Parameter of its own, so that whoever partitions
parameters partitions all of it, and its product keeps none of them for the backward: there they are read
again. It gives what bitsandbytes' own layer gives, by bitsandbytes' own kernels
(LLM.int8(): arXiv 2208.07339; QLoRA: arXiv 2305.14314).

    8-bit   weight (out, in) int8, SCB (out,) fp32: W = weight * SCB / 127
    4-bit   weight (n, 1) in its quant storage; absmax, one of each block of 64: fp32, or uint8 codes in blocks
            of 256 with nested_absmax fp32 and nested_offset (1,) fp32

The mode that a layer was left in changes no number while gradients are recorded, and none of a 4-bit layer
ever. Without gradients an 8-bit layer in eval mode runs bitsandbytes' int8 product, which rounds its input.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist.errors import BaseLayerError
from peft_dist.lazy import lazy

bitsandbytes = lazy("bitsandbytes")

BLOCK, NESTED_BLOCK = 64, 256
"""Values that bitsandbytes' 4-bit quantisation puts under one scale where it is not told another number, and scales
that its double quantisation puts under one."""
_STATISTICS = ("SCB", "absmax", "nested_absmax", "nested_offset")
_OF_8BIT = ("state", "index")
_OF_4BIT = (
    "compute_dtype",
    "compute_type_is_set",
    "quant_state",
    "quant_storage",
    "support_avx512bf16_for_cpu",
)
# Where DeepSpeed keeps the parameters that a module had when it was partitioned.
_OF_DEEPSPEED = "_original_parameters"
_MARK = "_peft_dist_statistic"
_WAITING = "_peft_dist_quantised_layers"


def is_8bit(kind: type[nn.Module]) -> bool:
    """Whether it is bitsandbytes' Linear8bitLt; does not import bitsandbytes."""
    return _is_named(kind, "Linear8bitLt")


def is_4bit(kind: type[nn.Module]) -> bool:
    """Whether it is bitsandbytes' Linear4bit; does not import bitsandbytes."""
    return _is_named(kind, "Linear4bit")


def _is_named(kind: type, name: str) -> bool:
    return any(k.__name__ == name and k.__module__.startswith("bitsandbytes.") for k in kind.__mro__)


def quantised_name(kind: type[nn.Module]) -> str | None:
    """What bitsandbytes calls such a layer, also one that is partitionable; None for any other."""
    return "Linear8bitLt" if is_8bit(kind) else "Linear4bit" if is_4bit(kind) else None


def is_statistic(parameter: Any) -> bool:
    """Whether it holds scales of codes, and is none of the model's own parameters."""
    return hasattr(parameter, _MARK)


def statistics(layer: nn.Module) -> dict[str, nn.Parameter]:
    """What `make_partitionable` made parameters of, in order; empty for a layer that it was not called on."""
    own = layer._parameters
    return {key: own[key] for key in _STATISTICS if is_statistic(own.get(key))}  # type: ignore[misc]


def settle(layer: Any) -> None:
    """Keeps a quantised layer as it is: its values do not change, and its mode changes none of its numbers.

    On CPUs with AVX512-BF16 bitsandbytes repacks a 4-bit weight in the first forward in eval mode, rounds its
    scales to bf16 for good, and lets no gradient through; such a layer is laid out again from what is left. An
    8-bit layer that is not quantised yet is, as its first forward would.
    """
    if is_4bit(type(layer)):
        layer.support_avx512bf16_for_cpu = False
        state = quant_state(layer)
        if state is not None and getattr(state, "packing_format_for_cpu", False):
            data, state = laid_out(layer.weight.data, state)
            layer.weight.data = data
            layer.weight.quant_state = layer.quant_state = state
    elif is_8bit(type(layer)) and not layer.weight.has_fp16_weights:
        _quiet()
        kind: Any = type(layer.state)
        layer.state.__class__ = _steady(kind)
        if layer.weight.dtype != torch.int8 and not layer.weight.is_meta:
            set_8bit(layer, *int8(layer.weight.data))


def settle_base(base: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Keeps the quantised layers among the modules of a base as they are, with or without an adapter on them: a
    gradient goes through all.

    Where an engine of the user's own partitions them later, they become partitionable before the next forward.
    """
    found = [module for module in modules if is_quantised(module)]
    for layer in found:
        settle(layer)
    if found and _WAITING not in base.__dict__:
        base.register_forward_pre_hook(_follow_the_weights, prepend=True)
    if found:
        base.__dict__[_WAITING] = tuple(found)


def keep_4bit(base: nn.Module) -> None:
    """Keeps 4-bit layers from being repacked before any adapter is there: what that rounds is gone for good."""
    for layer in base.modules():
        if is_4bit(type(layer)):
            settle(layer)


def is_quantised(module: nn.Module) -> bool:
    """Whether it is one of bitsandbytes' two quantised linear layers."""
    kind: Any = type(module)
    return _is_quantised(kind)


@functools.cache
def _is_quantised(kind: Any) -> bool:
    return is_8bit(kind) or is_4bit(kind)


def _follow_the_weights(base: nn.Module, args: Any) -> None:
    """Before a forward: codes and statistics of weights that were partitioned meanwhile are partitioned too."""
    waiting = base.__dict__[_WAITING]
    if waiting and hasattr(waiting[0].weight, "ds_id"):
        for layer in waiting:
            follow_the_weight(layer)
        base.__dict__[_WAITING] = ()


def follow_the_weight(layer: Any) -> None:
    """Partitions codes and statistics of a quantised layer whose weight an engine has partitioned; a collective.
    Any other layer stays as it is.

    Raises:
        BaseLayerError: the engine has cast the codes.
    """
    if not is_quantised(layer) or statistics(layer):
        return
    weight = layer.weight
    if not hasattr(weight, "ds_id") or getattr(weight, "has_fp16_weights", False):
        return
    stored_in = weight.quant_storage if is_4bit(type(layer)) else torch.int8
    if weight.dtype != stored_in:
        raise BaseLayerError(
            f"a {type(layer).__name__} whose codes are kept as {stored_in} was cast to {weight.dtype}, and holds no "
            "weight any more. DeepSpeed's fp16 and bf16 sections cast every floating parameter: leave them out, "
            "or load the base with bnb_4bit_quant_storage=torch.uint8."
        )
    make_partitionable(layer)
    weight.convert_to_zero_parameters(param_list=list(statistics(layer).values()))


# How many runs without gradients are under way that belong to one that records them.
_beside_recording = [0]


def is_recording() -> bool:
    """Whether gradients are recorded, or would be of the run that this one belongs to."""
    return torch.is_grad_enabled() or _beside_recording[0] > 0


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    """As `torch.no_grad`, for a run whose result one that records gradients reads: quantised layers then give it
    what they give that one, in whatever mode they were left."""
    is_beside = is_recording()
    _beside_recording[0] += is_beside
    try:
        with torch.no_grad():
            yield
    finally:
        _beside_recording[0] -= is_beside


@functools.cache
def _steady(kind: Any) -> type:
    """bitsandbytes' state of an 8-bit layer, that counts as training also while gradients are recorded."""
    if "is_training" in vars(kind) and isinstance(vars(kind)["is_training"], property):
        return kind

    def is_training(self: Any) -> bool:
        return self.__dict__.get("is_training", True) or is_recording()

    def set_training(self: Any, value: bool) -> None:
        self.__dict__["is_training"] = value

    return type(kind.__name__, (kind,), {"is_training": property(is_training, set_training)})


def quant_state(layer: Any) -> Any:
    """The scales of a 4-bit layer and what belongs to them; None before its weight is quantised."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.quant_state
    device = layer.weight.device
    if device != state.code.device and "absmax" in layer._parameters and device.type != "meta":
        # Parameters come to the device on which they are gathered; the levels of the codes follow them.
        _share_levels(state, str(device))
    return state


def scales_8bit(layer: Any) -> Tensor:
    """SCB (out,): the largest of each row of W."""
    if "SCB" in layer._parameters:
        return layer.SCB.data
    scales = layer.weight.SCB
    return layer.state.SCB if scales is None else scales


def taken_off(layer: Any) -> dict[str, Any]:
    """What a quantised layer has beside its parameters, and an nn.Linear has not; it is taken off the layer."""
    names = [key for key in (*_OF_8BIT, *_OF_4BIT, _OF_DEEPSPEED) if key in layer.__dict__]
    return {key: layer.__dict__.pop(key) for key in names}


def set_8bit(layer: Any, codes: Tensor, scales: Tensor | None) -> None:
    """Puts other codes (out, in) and scales (out,) into an 8-bit layer; a partitioned one must be gathered."""
    weight = layer.weight
    if "SCB" in layer._parameters:
        weight.data.copy_(codes)
        layer.SCB.data.copy_(scales)
        return
    weight.data = codes
    layer.state.reset_grads()
    if scales is not None:
        # As after `.to`: the next forward hands both on to the state.
        weight.CB, weight.SCB = weight.data, scales


def set_4bit(layer: Any, data: Tensor, state: Any) -> None:
    """Puts other packed codes and their state into a 4-bit layer; a partitioned one must be gathered."""
    parts = statistics(layer)
    if not parts:
        layer.weight.data = data
        layer.weight.quant_state = layer.quant_state = state
        return
    layer.weight.data.copy_(data)
    for key, value in _parts_of(state).items():
        parts[key].data.copy_(value)


def int8(W: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (out, in) of W and the scale (out,) of each row."""
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(W.contiguous().to(torch.float16))
    return codes, scales


def laid_out(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
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


# Layers that can be partitioned


def make_partitionable(layer: Any, dtype: torch.dtype = torch.float32) -> None:
    """Makes each tensor of a quantised layer a frozen Parameter of it, in place; any other layer stays as it is.

    The layer stays an instance of its class, on its device. On the meta device its Parameters are meta
    tensors of the sizes in `whole_sizes`, to be filled by whoever loads the base.

    Args:
        dtype: what a 4-bit W on the meta device counts as, once it is there.

    Raises:
        BaseLayerError: an 8-bit layer that keeps its weight in half precision and quantises it in each
            forward: it would hold the codes of all of it beside its share.
    """
    kind: Any = type(layer)
    if statistics(layer) or not (is_8bit(kind) or is_4bit(kind)):
        return
    if is_8bit(kind) and layer.weight.has_fp16_weights:
        raise BaseLayerError(
            f"a {kind.__name__} with has_fp16_weights=True cannot be partitioned: it quantises its whole weight "
            "in each forward. Load the base with has_fp16_weights=False."
        )
    settle(layer)
    if layer.weight.is_meta:
        _empty(layer, dtype)
    if is_8bit(kind):
        parts = {"SCB": scales_8bit(layer)}
        layer.weight.CB = layer.weight.SCB = None
        layer.state.reset_grads()
    else:
        parts = _parts_of(quant_state(layer))
    for key, value in parts.items():
        layer.register_parameter(key, _statistic(value))
    if is_4bit(kind):
        _refer(layer)
    layer.__class__ = _partitionable(kind)


def whole_sizes(layer: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of the codes and statistics of a quantised layer, from sizes and settings alone,
    as `make_partitionable` makes them."""
    out, in_, weight = layer.out_features, layer.in_features, layer.weight
    if is_8bit(type(layer)):
        return {"weight": ((out, in_), torch.int8), "SCB": ((out,), torch.float32)}
    per_item = 2 * weight.quant_storage.itemsize
    blocks = math.ceil(out * in_ / weight.blocksize)
    sizes = {
        "weight": (((out * in_ + 1) // per_item, 1), weight.quant_storage),
        "absmax": ((blocks,), torch.uint8 if weight.compress_statistics else torch.float32),
    }
    if weight.compress_statistics:
        sizes["nested_absmax"] = ((math.ceil(blocks / NESTED_BLOCK),), torch.float32)
        sizes["nested_offset"] = ((1,), torch.float32)
    return sizes


def _empty(layer: Any, dtype: torch.dtype) -> None:
    """A layer on the meta device as it is once it is quantised."""
    sizes = {
        key: torch.empty(shape, dtype=kind, device="meta")
        for key, (shape, kind) in whole_sizes(layer).items()
    }
    weight = layer.weight
    if is_8bit(type(layer)):
        layer.weight = type(weight)(sizes["weight"], requires_grad=False, SCB=sizes["SCB"])
        return
    functional = bitsandbytes.functional
    nested = "nested_absmax" in sizes
    state = functional.QuantState(
        absmax=sizes["absmax"],
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=_levels(weight.quant_type, "cpu"),
        blocksize=weight.blocksize,
        quant_type=weight.quant_type,
        dtype=dtype,
        offset=sizes["nested_offset"] if nested else None,
        state2=functional.QuantState(
            absmax=sizes["nested_absmax"],
            code=_nested_levels("cpu"),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        if nested
        else None,
    )
    kept = {
        key: getattr(weight, key)
        for key in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    }
    layer.weight = type(weight)(
        sizes["weight"], requires_grad=False, quant_state=state, module=layer, bnb_quantized=True, **kept
    )
    layer.quant_state = state


def _statistic(value: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(value.detach(), requires_grad=False)
    setattr(parameter, _MARK, True)
    return parameter


def _parts_of(state: Any) -> dict[str, Tensor]:
    """The statistics of a 4-bit weight, by the names that they have as parameters."""
    if state.state2 is None:
        return {"absmax": state.absmax}
    return {
        "absmax": state.absmax,
        "nested_absmax": state.state2.absmax,
        "nested_offset": state.offset.reshape(1),
    }


def _refer(layer: Any) -> None:
    """Lets the state of a 4-bit weight read the layer's own parameters, and its levels from one table."""
    state, parts = copy.copy(quant_state(layer)), statistics(layer)
    device = str(layer.weight.device) if not layer.weight.is_meta else "cpu"
    state.absmax = parts["absmax"]
    if state.state2 is not None:
        state.state2 = copy.copy(state.state2)
        state.state2.absmax, state.offset = parts["nested_absmax"], parts["nested_offset"]
    _share_levels(state, device)
    layer.weight.quant_state = layer.quant_state = state


def _share_levels(state: Any, device: str) -> None:
    """Brings the levels of a 4-bit weight's codes to a device, where layers share one table of them."""
    state.code = _shared(state.code.to(device), _levels(state.quant_type, device))
    if state.state2 is not None:
        state.state2.code = _shared(state.state2.code.to(device), _nested_levels(device))


def _shared(own: Tensor, table: Tensor) -> Tensor:
    return table if own.device == table.device and torch.equal(own, table) else own


@functools.cache
def _levels(quant_type: str, device: str) -> Tensor:
    return bitsandbytes.functional.get_4bit_type(quant_type, device=device)


@functools.cache
def _nested_levels(device: str) -> Tensor:
    return bitsandbytes.functional.create_dynamic_map().to(device)


@functools.cache
def _partitionable(kind: Any) -> type:
    """A subclass of the class of a quantised layer that reads its own parameters alone."""
    mixin = _Partitionable8bit if is_8bit(kind) else _Partitionable4bit
    return type(f"Partitionable{kind.__name__}", (mixin, kind), {})


class _Product(torch.autograd.Function):
    """x -> the layer's output. It keeps no codes: between its forward and its backward they may be released."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, is_training: bool) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer._multiplied(x, is_training)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.layer._multiplied_back(gradients[0], ctx.dtype), None, None


class _Partitionable8bit:
    """In front of Linear8bitLt: codes and scales are parameters, and `state` holds neither."""

    weight: Any
    SCB: Any
    bias: Any
    state: Any
    training: bool

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self, self.training or is_recording())  # type: ignore[no-any-return]

    def _multiplied(self, x: Tensor, is_training: bool) -> Tensor:
        state = bitsandbytes.MatmulLtState()
        state.CB, state.SCB = self.weight.data, self.SCB.data
        state.has_fp16_weights, state.threshold = False, self.state.threshold
        state.is_training = is_training
        bias = None if self.bias is None else self.bias.data.to(x.dtype)
        return bitsandbytes.matmul(x, state.CB, bias=bias, state=state)

    def _multiplied_back(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        # Rounded where bitsandbytes rounds.
        W = self.weight.data.to(dtype, copy=True).mul_(self.SCB.data.unsqueeze(1).mul(1.0 / 127.0))
        return gradient.to(dtype) @ W


class _Partitionable4bit:
    """In front of Linear4bit: the state of the weight reads the layer's parameters."""

    weight: Any
    bias: Any
    compute_dtype: Any
    compute_type_is_set: bool
    set_compute_type: Any

    def forward(self, x: Tensor) -> Tensor:
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        computed = x if self.compute_dtype is None else x.to(self.compute_dtype)
        return _Product.apply(computed, self, True).to(x.dtype)  # type: ignore[no-any-return]

    def _multiplied(self, x: Tensor, is_training: bool) -> Tensor:
        bias = None if self.bias is None else self.bias.data.to(x.dtype)
        return bitsandbytes.matmul_4bit(x, self.weight.data, bias=bias, quant_state=quant_state(self))

    def _multiplied_back(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        W = bitsandbytes.functional.dequantize_4bit(self.weight.data, quant_state(self))
        return gradient @ W.to(gradient.dtype)


class _Quiet(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


_QUIET = _Quiet()


def _quiet() -> None:
    """Lets bitsandbytes multiply fp32 without saying at each call that it casts to fp16."""
    # A filter that is there already is not added again.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_QUIET)
