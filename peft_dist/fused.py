"""Layers with an adapter as one node of the autograd graph: cheaper paths to what methods define.

One node keeps only what its backward reads, adds in place, and knows that the weight is frozen. `plain` says
where that may be done; everywhere else a method runs the layer itself, so that hooks see it. Differentiating
twice is refused by torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from peft_dist.base_layer import Conv1DLayer, LinearLayer
from peft_dist.contract import BaseLayer


def plain(base: BaseLayer, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """(W, b) themselves, where the layer may be computed without being called; else None.

    That is a frozen, whole, unquantised linear layer that nobody hooks into, in the dtype of x and of the
    adapter's `tensors`, outside of autocast, compilation and functional transforms.
    """
    if type(base) not in _DOORS:
        return None
    layer = base.layer  # type: ignore[attr-defined]
    weight = layer._parameters.get("weight")
    if (
        type(layer) not in _LAYERS
        or "forward" in layer.__dict__
        or layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
        or type(weight) is not nn.Parameter
        or weight.requires_grad
        or hasattr(weight, "ds_id")
        or x.dtype != weight.dtype
        or any(t.dtype != x.dtype for t in tensors)
        or x.ndim < 2
        or torch.is_autocast_enabled(x.device.type)
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or nn.modules.module._has_any_global_hook()
    ):
        return None
    return (weight if type(layer) is nn.Linear else weight.T), layer._parameters.get("bias")


_DOORS, _LAYERS = (LinearLayer, Conv1DLayer), (nn.Linear, Conv1D)


def low_rank(
    x: Tensor, entered: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """x W^T + b + s (entered A^T) B^T; `entered` may be x itself."""
    return _LowRank.apply(x, entered, W, b, A, B, scaling)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, entered: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        taken = rows if entered is x else entered.reshape(-1, x.shape[-1])
        # The small product first: it fetches x for the large one.
        h = torch.mm(taken, A.T)
        y = _linear(rows, W, b).addmm_(h, B.T, alpha=scaling)
        ctx.save_for_backward(taken, h, W, A, B)
        ctx.scaling, ctx.shape, ctx.is_same = scaling, x.shape, entered is x
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        taken, h, W, A, B = ctx.saved_tensors
        s, wanted = ctx.scaling, ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        g_x = g_entered = None
        u = torch.mm(g, B)
        # beta = 0: the first argument lends its shape alone.
        g_B = torch.addmm(B, g.T, h, beta=0, alpha=s) if wanted[5] else None
        if wanted[0]:
            g_x = torch.mm(g, W)
            if ctx.is_same:
                g_x.addmm_(u, A, alpha=s)
            g_x = g_x.view(ctx.shape)
        if wanted[1] and not ctx.is_same:
            g_entered = torch.mm(u, A).mul_(s).view(ctx.shape)
        g_A = torch.addmm(A, u.T, taken, beta=0, alpha=s) if wanted[4] else None
        return g_x, g_entered, None, None, g_A, g_B, None


def scaled(x: Tensor, W: Tensor, b: Tensor | None, scale: Tensor) -> Tensor:
    """scale * (x W^T + b)."""
    return _Scaled.apply(x, W, b, scale)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, scale: Tensor) -> Tensor:
        y = _linear(x.reshape(-1, x.shape[-1]), W, b)
        ctx.save_for_backward(y, W, scale)
        ctx.shape = x.shape
        return (y * scale).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, W, scale = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        g_scale = _sum_of_products(g, y) if ctx.needs_input_grad[3] else None
        g_x = torch.mm(g * scale, W).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return g_x, None, None, g_scale


def scaled_input(x: Tensor, W: Tensor, b: Tensor | None, scale: Tensor) -> Tensor:
    """(scale * x) W^T + b."""
    return _ScaledInput.apply(x, W, b, scale)


class _ScaledInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, scale: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, W, scale)
        ctx.shape = x.shape
        return _linear(rows * scale, W, b).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, W, scale = ctx.saved_tensors
        g = torch.mm(gradient.reshape(-1, gradient.shape[-1]), W)
        g_scale = _sum_of_products(rows, g) if ctx.needs_input_grad[3] else None
        g_x = g.mul_(scale).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return g_x, None, None, g_scale


def _linear(rows: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    return torch.mm(rows, W.T) if b is None else torch.addmm(b, rows, W.T)


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """The sum over rows of a * b."""
    if a.device.type != "cpu" or a.dtype not in (torch.float32, torch.float64):
        return (a * b).sum(0)
    # The gradient of a layer norm's scale is this sum, taken in one pass, where the mean is 0 and the
    # deviation 1.
    zeros, ones = a.new_zeros(len(a), 1), a.new_ones(len(a), 1)
    like, mask = a[0], (False, True, False)
    return torch.ops.aten.native_layer_norm_backward(a, b, like.shape, zeros, ones, like, None, mask)[1]
