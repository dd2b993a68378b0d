"""A frozen layer and a change of low rank: LoRA and VeRA, DoRA, HRA, MiSS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_dist.fused.node import Node
from peft_dist.fused.plain import flat, linear, shaped
from peft_dist.fused.scaled import sum_of_products

Part = tuple[Tensor, Tensor | None, Tensor, Tensor, float]


def low_rank(x: Tensor, entered: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """x W^T + b + s (entered A^T) B^T for each (W, b, A, B, s) of `parts`, layers that take the same x;
    `entered` may be x itself."""
    tensors = [t for part in parts for t in part[:4]]
    return _LowRank.run(x, entered, [part[4] for part in parts], *tensors)


class _LowRank(Node):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, entered: Tensor, scalings: list[float], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        Ws, bs, As, Bs = (tensors[i::4] for i in range(4))
        rows = flat(x)
        taken = rows if entered is x else flat(entered)
        given, hs = [], []
        for W, b, A, B, s in zip(Ws, bs, As, Bs, scalings, strict=True):
            # The small product first: it fetches x for the large one. Each layer by itself: not a bit of what it
            # gives depends on the others.
            hs.append(torch.mm(taken, A.T))
            given.append(linear(rows, W, b).addmm_(hs[-1], B.T, alpha=s))
        # What a frozen A reads is not needed again.
        trains_A = any(ctx.needs_input_grad[5::4])
        ctx.save_for_backward(taken if trains_A else None, *hs, *Ws, *As, *Bs)
        ctx.scalings, ctx.shape, ctx.is_same = scalings, x.shape, entered is x
        ctx.set_materialize_grads(False)
        return tuple(shaped(y, x) for y in given)

    @staticmethod
    def gradients(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        taken, *kept = ctx.saved_tensors
        num, wanted, g_x, g_entered = len(gs), ctx.needs_input_grad, None, None
        hs, Ws, As, Bs = (kept[i * num : (i + 1) * num] for i in range(4))
        ranks = [len(A) for A in As]
        A = As[0] if num == 1 else torch.cat(As)
        u = hs[0].new_empty(len(hs[0]), len(A))
        us = u.split(ranks, 1)
        g_Bs: list[Tensor | None] = [None] * num
        for i, g in enumerate(gs):
            if g is None:
                us[i].zero_()
                continue
            s, B = ctx.scalings[i], Bs[i]
            # beta = 0: what would be added lends its shape alone. The transpose takes less time.
            torch.addmm(us[i], g, B, beta=0, alpha=s, out=us[i])
            if wanted[6 + 4 * i]:
                g_Bs[i] = torch.addmm(B.T, hs[i].T, g, beta=0, alpha=s).T
            if wanted[0]:
                g_x = torch.mm(g, Ws[i]) if g_x is None else g_x.addmm_(g, Ws[i])
        if g_x is not None:
            g_x = (g_x.addmm_(u, A) if ctx.is_same else g_x).view(ctx.shape)
        if wanted[1] and not ctx.is_same:
            g_entered = torch.mm(u, A).view(ctx.shape)
        g_As = [None] * num if taken is None else torch.mm(u.T, taken).split(ranks)
        each = [
            (None, None, None if g is None or not wanted[5 + 4 * i] else g_A, g_B)
            for i, (g, g_A, g_B) in enumerate(zip(gs, g_As, g_Bs, strict=True))
        ]
        return g_x, g_entered, None, *(t for part in each for t in part)


def projected(
    x: Tensor,
    entered: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    outer: Tensor,
    inner: Tensor,
) -> Tensor:
    """x W^T + b + outer * ((inner * (entered A^T)) B^T) with frozen A and B; `entered` may be x itself."""
    return _Projected.run(x, entered, W, b, A, B, outer, inner)


class _Projected(Node):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        entered: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        outer: Tensor,
        inner: Tensor,
    ) -> Tensor:
        rows = flat(x)
        h = torch.mm(rows if entered is x else flat(entered), A.T)
        ctx.save_for_backward(h, W, A, B, outer, inner)
        ctx.shape, ctx.is_same = x.shape, entered is x
        y = linear(rows, W, b).addmm_(h, (B * inner).mul_(outer[:, None]).T)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, W, A, B, outer, inner = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        g_x = g_entered = g_outer = g_inner = None
        scaled = B * inner
        if wanted[6] or wanted[7]:
            both = torch.mm(g.T, h)
            g_outer = (both * scaled).sum(1)
            g_inner = torch.mv(both.mul_(B).T, outer)
        if wanted[0] or wanted[1]:
            u = torch.mm(g, scaled.mul_(outer[:, None]))
            g_x = torch.mm(g, W) if wanted[0] else None
            if not ctx.is_same:
                g_entered = torch.mm(u, A).view(ctx.shape) if wanted[1] else None
            elif g_x is not None:
                g_x.addmm_(u, A)
        g_x = None if g_x is None else g_x.view(ctx.shape)
        return g_x, g_entered, None, None, None, None, g_outer, g_inner


def stretched(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, m: Tensor, scaling: float
) -> Tensor:
    """m / |W + s B A| * (x (W + s B A)^T) + b, where the lengths of the rows are constants for the gradient."""
    return _Stretched.run(x, W, b, A, B, m, scaling)


class _Stretched(Node):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, m: Tensor, scaling: float
    ) -> Tensor:
        rows = flat(x)
        V = torch.addmm(W, B, A, alpha=scaling)
        length = V.norm(dim=1)
        y = torch.mm(rows, V.T)
        ctx.save_for_backward(rows, y, W, A, B, m, length)
        ctx.scaling, ctx.shape = scaling, x.shape
        given = y * (m / length)
        return (given if b is None else given.add_(b)).view(*x.shape[:-1], -1)

    @staticmethod
    def gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, y, W, A, B, m, length = ctx.saved_tensors
        s, wanted = ctx.scaling, ctx.needs_input_grad
        g_x = g_A = g_B = None
        g_m = sum_of_products(g, y).div_(length) if wanted[5] else None
        g = g * (m / length)
        u = torch.mm(g, B)
        if wanted[4]:
            g_B = torch.addmm(B, g.T, torch.mm(rows, A.T), beta=0, alpha=s)
        if wanted[0]:
            g_x = torch.mm(g, W).addmm_(u, A, alpha=s).view(ctx.shape)
        if wanted[3]:
            g_A = torch.addmm(A, u.T, rows, beta=0, alpha=s)
        return g_x, None, None, g_A, g_B, g_m, None


def reflected(x: Tensor, W: Tensor, b: Tensor | None, U: Tensor, V: Tensor) -> Tensor:
    """(x - (x V^T) U^T) W^T + b, for U (in, r) and V (r, in)."""
    return _Reflected.run(x, W, b, U, V)


class _Reflected(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, U: Tensor, V: Tensor) -> Tensor:
        rows = flat(x)
        h = torch.mm(rows, V.T)
        y = linear(rows, W, b).addmm_(h, torch.mm(W, U).T, alpha=-1)
        ctx.save_for_backward(rows, h, W, U, V)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, W, U, V = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        g = torch.mm(g, W)
        u = torch.mm(g, U)
        g_U = torch.addmm(U, g.T, h, beta=0, alpha=-1) if wanted[3] else None
        g_V = torch.addmm(V, u.T, rows, beta=0, alpha=-1) if wanted[4] else None
        g_x = g.addmm_(u, V, alpha=-1).view(ctx.shape) if wanted[0] else None
        return g_x, None, None, g_U, g_V


def pooled(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor) -> Tensor:
    """x W^T + b + (x summed over its r-blocks) D, for D (r, out)."""
    return _Pooled.run(x, W, b, D)


class _Pooled(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, D: Tensor) -> Tensor:
        rows = flat(x)
        h = rows.unflatten(1, (-1, len(D))).sum(1)
        ctx.save_for_backward(h, W, D)
        ctx.shape = x.shape
        return linear(rows, W, b).addmm_(h, D).view(*x.shape[:-1], -1)

    @staticmethod
    def gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, W, D = ctx.saved_tensors
        wanted, g_x = ctx.needs_input_grad, None
        if wanted[0]:
            g_x = torch.mm(g, W)
            g_x.unflatten(1, (-1, len(D))).add_(torch.mm(g, D.T)[:, None])
            g_x = g_x.view(ctx.shape)
        return g_x, None, None, torch.mm(h.T, g) if wanted[3] else None
