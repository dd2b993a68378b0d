"""A frozen layer whose input channels are scaled: IA3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_dist.fused.node import Node
from peft_dist.fused.plain import flat, linear


def scaled_input(x: Tensor, W: Tensor, b: Tensor | None, scale: Tensor) -> Tensor:
    """(scale * x) W^T + b."""
    return _ScaledInput.run(x, W, b, scale)


class _ScaledInput(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, scale: Tensor) -> Tensor:
        rows = flat(x)
        ctx.save_for_backward(rows, W, scale)
        ctx.shape = x.shape
        return linear(rows * scale, W, b).view(*x.shape[:-1], -1)

    @staticmethod
    def gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, W, scale = ctx.saved_tensors
        g = torch.mm(g, W)
        g_scale = sum_of_products(rows, g) if ctx.needs_input_grad[3] else None
        g_x = g.mul_(scale).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return g_x, None, None, g_scale


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """The sum over rows of a * b."""
    if a.device.type != "cpu" or a.dtype not in (torch.float32, torch.float64) or not len(a):
        return (a * b).sum(0)
    # The gradient of a layer norm's scale is this sum, taken in one pass, where the mean is 0 and the
    # deviation 1.
    zeros, ones = a.new_zeros(len(a), 1), a.new_ones(len(a), 1)
    like, mask = a[0], (False, True, False)
    return torch.ops.aten.native_layer_norm_backward(a, b, like.shape, zeros, ones, like, None, mask)[1]
