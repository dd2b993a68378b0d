"""A frozen layer and a change of its whole weight: LoHa, LoKr, FourierFT and all that have nothing cheaper.

One product with W + dW in place of two. The sum is kept for the backward, dW itself is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_dist.contract import BaseLayer, Enter, Params, WeightMethod
from peft_dist.fused.node import Node
from peft_dist.fused.plain import exactly, flat, linear


def by_delta(method: WeightMethod, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
    """The layer adapted by a method that has nothing cheaper than its dW."""
    entered = enter(x)
    frozen = exactly(base, x) if entered is x else None
    if frozen is None:
        return base(x) + method.added(p, base, entered)
    W, b = frozen
    db = method.bias_delta(p, base)
    y = changed(x, W, b, method.delta(p, base))
    return y if db is None else y + db


def changed(x: Tensor, W: Tensor, b: Tensor | None, dW: Tensor) -> Tensor:
    """x (W + dW)^T + b."""
    return _Changed.run(x, W, b, dW)


class _Changed(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, dW: Tensor) -> Tensor:
        rows, V = flat(x), W + dW
        ctx.save_for_backward(rows, V)
        ctx.shape = x.shape
        return linear(rows, V, b).view(*x.shape[:-1], -1)

    @staticmethod
    def gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, V = ctx.saved_tensors
        g_x = torch.mm(g, V).view(ctx.shape) if ctx.needs_input_grad[0] else None
        g_W = torch.mm(g.T, rows) if ctx.needs_input_grad[3] else None
        return g_x, None, None, g_W


def hadamard(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, scaling: float) -> Tensor:
    """s (A1 B1) * (A2 B2), elementwise; the backward makes both products again."""
    if torch.compiler.is_compiling():  # which decides itself what it keeps
        return (A1 * scaling) @ B1 * (A2 @ B2)
    return _Hadamard.apply(A1, B1, A2, B2, scaling)


class _Hadamard(Node):
    @staticmethod
    def forward(ctx: Any, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(A1, B1, A2, B2)
        ctx.scaling = scaling
        return torch.mm(A1 * scaling, B1).mul_(torch.mm(A2, B2))

    @staticmethod
    def gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        A1, B1, A2, B2 = ctx.saved_tensors
        one = torch.mm(A2 * ctx.scaling, B2).mul_(g)
        two = torch.mm(A1 * ctx.scaling, B1).mul_(g)
        return torch.mm(one, B1.T), torch.mm(A1.T, one), torch.mm(two, B2.T), torch.mm(A2.T, two), None


def changed_by_kronecker(x: Tensor, W: Tensor, b: Tensor | None, first: Tensor, second: Tensor) -> Tensor:
    """x (W + first (x) second)^T + b; the gradient of dW is never made."""
    return _Kronecker.run(x, W, b, first, second)


class _Kronecker(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, first: Tensor, second: Tensor) -> Tensor:
        (o1, i1), (o2, i2), rows = first.shape, second.shape, flat(x)
        V = torch.addcmul(W.reshape(o1, o2, i1, i2), first[:, None, :, None], second[:, None, :])
        V = V.view(o1 * o2, i1 * i2)
        ctx.save_for_backward(rows, V, first, second)
        ctx.shape = x.shape
        return linear(rows, V, b).view(*x.shape[:-1], -1)

    @staticmethod
    def gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, V, first, second = ctx.saved_tensors
        (o1, i1), (o2, i2), wanted = first.shape, second.shape, ctx.needs_input_grad
        g_first = g_second = None
        g_x = torch.mm(g, V).view(ctx.shape) if wanted[0] else None
        xs = rows.view(-1, i1, i2).transpose(0, 1)
        gs = g.view(-1, o1, o2).transpose(0, 1).reshape(o1, -1) if wanted[3] or wanted[4] else g
        if wanted[3]:
            z = torch.matmul(xs, second.T)
            g_first = torch.mm(gs, z.view(i1, -1).T)
        if wanted[4]:
            u = torch.mm(first.T, gs).view(i1, -1, o2)
            g_second = torch.bmm(u.mT, xs).sum(0)
        return g_x, None, None, g_first, g_second
