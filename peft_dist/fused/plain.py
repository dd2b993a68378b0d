"""Where a layer may be computed without being called."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_dist.base_layer import Conv1DLayer, LinearLayer
from peft_dist.contract import BaseLayer
from peft_dist.resting import RestingLinear

_unsafe_view = torch.ops.aten._unsafe_view.default
_DOORS, _LAYERS = (LinearLayer, Conv1DLayer), (nn.Linear, RestingLinear, Conv1D)


def plain(base: BaseLayer, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """(W, b) themselves, where the layer may be computed without being called; else None.

    That is a frozen, whole, unquantised linear layer that nobody hooks into, or whose call is under way (a
    partitioned weight is then whole, and will be in the backward), in the dtype of x and of the adapter's
    `tensors`, outside of autocast, compilation and functional transforms.
    """
    if type(base) not in _DOORS:
        return None
    layer = base.layer  # type: ignore[attr-defined]
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if (
        type(layer) not in _LAYERS
        or not (base.is_running or _is_untouched(layer, weight))  # type: ignore[attr-defined]
        or type(weight) is not nn.Parameter
        or weight.requires_grad
        or x.dtype != weight.dtype
        or any(t.dtype != x.dtype for t in tensors)
        or x.ndim < 2
        or (bias is not None and bias.requires_grad)
        or torch.is_autocast_enabled(x.device.type)
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or nn.modules.module._has_any_global_hook()
    ):
        return None
    return (weight.T if type(layer) is Conv1D else weight), bias


def _is_untouched(layer: nn.Module, weight: Tensor) -> bool:
    """Whether nothing happens around the layer's forward."""
    return not (
        "forward" in layer.__dict__
        or layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
        or hasattr(weight, "ds_id")
    )


def exactly(base: BaseLayer, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """`plain` where a sum of the weight and a small change keeps the change: not in half precision."""
    return plain(base, x, *tensors) if x.dtype in (torch.float32, torch.float64) else None


def foldable(base: BaseLayer, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """`exactly` where a product with the weight may be kept until the backward: it takes no more room than x or y,
    and the weight itself is whole all the time."""
    if x.device.type != "cpu" or base.is_running:  # type: ignore[attr-defined]
        return None
    frozen = exactly(base, x, *tensors)
    return frozen if frozen and x.numel() >= min(frozen[0].shape) * x.shape[-1] else None


def linear(rows: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """rows (n, in) -> (n, out)."""
    return torch.mm(rows, W.T) if b is None else torch.addmm(b, rows, W.T)


def flat(x: Tensor) -> Tensor:
    """x (..., channels) as (rows, channels)."""
    return x.reshape(-1, x.shape[-1])


def shaped(rows: Tensor, x: Tensor) -> Tensor:
    """rows (n, out) as (..., out) after x (..., in): no view for autograd, so that it may be changed in place."""
    return _unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])
