"""A frozen layer whose input is turned block by block: OFT and BOFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_dist.fused.plain import flat, linear


def turned(x: Tensor, W: Tensor, b: Tensor | None, R: Tensor) -> Tensor:
    """(x diag(R)) W^T + b, with the blocks R (blocks, b, b)."""
    return _Turned.apply(x, W, b, R)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, R: Tensor) -> Tensor:
        rows = flat(x)
        ctx.save_for_backward(rows, W, R)
        ctx.shape = x.shape
        return linear(_turn(rows, R), W, b).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, W, R = ctx.saved_tensors
        g = torch.mm(flat(gradient), W)
        g_R = torch.bmm(_blocks(rows, R).mT, _blocks(g, R)) if ctx.needs_input_grad[3] else None
        g_x = _turn(g, R.mT).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return g_x, None, None, g_R


def _blocks(rows: Tensor, R: Tensor) -> Tensor:
    return rows.view(len(rows), -1, R.shape[-1]).transpose(0, 1)


def _turn(rows: Tensor, R: Tensor) -> Tensor:
    given = torch.empty_like(rows)
    torch.bmm(_blocks(rows, R), R, out=_blocks(given, R))
    return given


def cayley_series(Q: Tensor) -> Tensor:
    """I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 of skew Q (n, b, b)."""
    return _CayleySeries.apply(Q)


class _CayleySeries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, Q: Tensor) -> Tensor:
        S = torch.bmm(Q, Q)
        ctx.save_for_backward(Q, S)
        R = torch.baddbmm(Q, S, _inner(Q, S), beta=2)
        R.diagonal(dim1=1, dim2=2).add_(1)
        return R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        # R = I + 2 Q + S M with S = Q^2 and M = 2 I + 2 Q + S.
        Q, S = ctx.saved_tensors
        g_M = torch.bmm(S, g)
        g_S = torch.baddbmm(g_M, g, _inner(Q, S).mT)
        g_Q = torch.baddbmm(torch.bmm(g_S, Q), Q, g_S)
        return torch.add(g, g_M).mul_(2).sub_(g_Q)


def _inner(Q: Tensor, S: Tensor) -> Tensor:
    M = torch.add(S, Q, alpha=2)
    M.diagonal(dim1=1, dim2=2).add_(2)
    return M
