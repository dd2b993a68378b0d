"""A frozen layer whose input or output channels are scaled: IA3."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_dist.compiled import scaled_loop
from peft_dist.fused.node import Node
from peft_dist.fused.plain import flat, linear, shaped
from peft_dist.saved_tensors import version


def scaled_input(x: Tensor, W: Tensor, b: Tensor | None, scale: Tensor) -> Tensor:
    """(scale * x) W^T + b, for a scale (in,) of any shape."""
    return _ScaledInput.run(x, W, b, scale)


class _ScaledInput(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, scale: Tensor) -> Tensor:
        rows = flat(x)
        ctx.save_for_backward(rows, W, scale)
        ctx.shape = x.shape
        return shaped(linear(rows * scale.view(-1), W, b), x)

    @staticmethod
    def gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, W, scale = ctx.saved_tensors
        g = torch.mm(g, W)
        sums = _scale(g, rows, scale.view(-1), g)
        g_x = g.view(ctx.shape) if ctx.needs_input_grad[0] else None
        return g_x, None, None, sums.view_as(scale)


def scaled_outputs(x: Tensor, parts: Sequence[tuple[Tensor, Tensor | None, Tensor]]) -> tuple[Tensor, ...]:
    """scale * (x W^T + b) for each (W, b, scale) of `parts`, layers that take the same x, with scales (out,) of any
    shape. What is scaled in place gives the scale's gradient as well, where the sums can be divided by the scale again.
    On CPUs, where saved tensors are not hooked."""
    return _ScaledOutputs.run(x, *(t for part in parts for t in part))


class _ScaledOutputs(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        Ws, bs, scales = (tensors[i::3] for i in range(3))
        rows = flat(x)
        ys = [linear(rows, W, b).mul_(scale.view(-1)) for W, b, scale in zip(Ws, bs, scales, strict=True)]
        given = tuple(shaped(y, x) for y in ys)
        ctx.save_for_backward(*ys, *Ws, *bs, *scales)
        # Whoever takes what is given may change it in place, as some activations do, and x as well: these have their
        # versions.
        ctx.given = [(t.detach(), version(t)) for t in (rows, *given)]
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return given

    @staticmethod
    def gradients(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        num, wanted, g_x = len(gs), ctx.needs_input_grad, None
        saved = ctx.saved_tensors
        ys, Ws, bs, scales = (saved[i * num : (i + 1) * num] for i in range(4))
        each: list[Tensor | None] = []
        scaled = Ws[0].new_empty(0)
        for i, g in enumerate(gs):
            if g is None:
                each += [None, None, None]
                continue
            scale = scales[i].view(-1)
            is_enough = _is_as_given(ctx, i + 1) and _is_divisor(scale)
            # The same memory for all of them: it is still in the processor's cache.
            scaled = scaled if scaled.shape == g.shape else torch.empty_like(g)
            g_scale = _scale(g, ys[i] if is_enough else linear(_rows(ctx), Ws[i], bs[i]), scale, scaled)
            if is_enough:
                g_scale.div_(scale)
            if wanted[0]:
                g_x = torch.mm(scaled, Ws[i]) if g_x is None else g_x.addmm_(scaled, Ws[i])
            each += [None, None, g_scale.view_as(scales[i])]
        return None if g_x is None else g_x.view(ctx.shape), *each


def _is_as_given(ctx: Any, place: int) -> bool:
    tensor, before = ctx.given[place]
    return version(tensor) == before


def _rows(ctx: Any) -> Tensor:
    if not _is_as_given(ctx, 0):
        raise RuntimeError(
            "IA3: what a layer took was changed in place, and what it gave as well, or its scale is 0 somewhere; one "
            "of the two is needed for the scale's gradient. Change a copy of what it takes."
        )
    return ctx.given[0][0]


def _is_divisor(scale: Tensor) -> bool:
    """Whether what was multiplied by it can be divided by it again."""
    return float(torch.linalg.vector_norm(scale, -float("inf"))) > 1e-20


def _scale(g: Tensor, y: Tensor, scale: Tensor, given: Tensor) -> Tensor:
    """g * scale into `given`, which may be g; the sum over rows of g * y."""
    if scaled_loop.suits(g, y, scale):
        return scaled_loop.scale(g, y, scale, given)
    sums = sum_of_products(g, y)
    torch.mul(g, scale, out=given)
    return sums


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """The sum over rows of a * b."""
    if a.device.type != "cpu" or a.dtype not in (torch.float32, torch.float64) or not len(a):
        return (a * b).sum(0)
    # The gradient of a layer norm's scale is this sum, taken in one pass, where the mean is 0 and the
    # deviation 1.
    zeros, ones = _zeros_and_ones(len(a), a.dtype)
    like, mask = a[0], (False, True, False)
    return torch.ops.aten.native_layer_norm_backward(a, b, like.shape, zeros, ones, like, None, mask)[1]


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _zeros_and_ones(num: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(num, 1, dtype=dtype), torch.ones(num, 1, dtype=dtype)
