"""A frozen layer whose input is turned block by block: OFT."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_dist.fused.node import Node
from peft_dist.fused.plain import flat, linear, shaped


def turned(x: Tensor, W: Tensor, b: Tensor | None, R: Tensor) -> Tensor:
    """(x diag(R)) W^T + b, with the blocks R (blocks, b, b)."""
    return _Turned.run(x, W, b, R)


class _Turned(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, R: Tensor) -> Tensor:
        rows = flat(x)
        ctx.save_for_backward(rows, W, R)
        ctx.shape = x.shape
        return linear(_turn(rows, R), W, b).view(*x.shape[:-1], -1)

    @staticmethod
    def gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, W, R = ctx.saved_tensors
        g = torch.mm(g, W)
        g_R = torch.bmm(_blocks(rows, R).mT, _blocks(g, R)) if ctx.needs_input_grad[3] else None
        g_x = _turn(g, R.mT).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return g_x, None, None, g_R


def _blocks(rows: Tensor, R: Tensor) -> Tensor:
    return rows.view(len(rows), -1, R.shape[-1]).transpose(0, 1)


def _turn(rows: Tensor, R: Tensor, to: Tensor | None = None) -> Tensor:
    """rows turned, added to `to` in place where it is given."""
    if to is not None:
        given = _blocks(to, R)
        torch.baddbmm(given, _blocks(rows, R), R, out=given)
        return to
    given = torch.empty_like(rows)
    torch.bmm(_blocks(rows, R), R, out=_blocks(given, R))
    return given


def turned_by_series(x: Tensor, parts: Sequence[tuple[Tensor, Tensor | None, Tensor]]) -> tuple[Tensor, ...]:
    """`turned` by R = I + 2 K + 2 K^2 + 2 K^3 + K^4 for each (W, b, Q) of `parts`, layers that take the same
    x; K are the skew matrices of the entries Q (n, b(b-1)/2)."""
    return _TurnedBySeries.run(x, *(t for part in parts for t in part))


class _TurnedBySeries(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        Ws, bs, Qs = (tensors[i::3] for i in range(3))
        rows, K = flat(x), skew(Qs[0] if len(Qs) == 1 else torch.cat(Qs))
        S = torch.bmm(K, K)
        R = _series(K, S)
        ctx.save_for_backward(rows, K, S, R, *Ws)
        ctx.shape, ctx.num_blocks = x.shape, len(Qs[0])
        ctx.set_materialize_grads(False)
        Rs = R.split(ctx.num_blocks)
        return tuple(shaped(linear(_turn(rows, R), W, b), x) for R, W, b in zip(Rs, Ws, bs, strict=True))

    @staticmethod
    def gradients(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, K, S, R, *Ws = ctx.saved_tensors
        wanted, g_x, num = ctx.needs_input_grad, None, ctx.num_blocks
        g_R, trains = torch.zeros_like(R) if None in gs else torch.empty_like(R), any(wanted[3::3])
        for g, W, R_own, g_own in zip(gs, Ws, R.split(num), g_R.split(num), strict=True):
            if g is None:
                continue
            g = torch.mm(g, W)
            if trains:
                torch.bmm(_blocks(rows, R).mT, _blocks(g, R), out=g_own)
            if wanted[0]:
                g_x = _turn(g, R_own.mT, g_x)
        g_Qs = _entries(g_R, K, S).split(num) if trains else [None] * len(gs)
        each = [
            (None, None, None if g is None or not wanted[3 + 3 * i] else g_Q)
            for i, (g, g_Q) in enumerate(zip(gs, g_Qs, strict=True))
        ]
        return None if g_x is None else g_x.view(ctx.shape), *(t for part in each for t in part)


def skew(Q: Tensor) -> Tensor:
    """Skew matrices (n, b, b) of the entries (n, b(b-1)/2) above their diagonals."""
    b = math.isqrt(2 * Q.shape[1]) + 1
    upper = Q.new_zeros(Q.shape[0], b * b).index_copy(1, _above(b, Q.device)[0], Q).view(-1, b, b)
    return upper - upper.mT


@functools.lru_cache(maxsize=64)
def _above(b: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the entries above the diagonal of a matrix (b, b) are, and their mirror images."""
    row, column = torch.triu_indices(b, b, 1, device=device)
    return row * b + column, column * b + row


def _inner(K: Tensor, S: Tensor) -> Tensor:
    """M = 2 I + 2 K + S, with which R = I + 2 K + S M."""
    M = torch.add(S, K, alpha=2)
    M.diagonal(dim1=1, dim2=2).add_(2)
    return M


def _series(K: Tensor, S: Tensor) -> Tensor:
    R = torch.baddbmm(K, S, _inner(K, S), beta=2)
    R.diagonal(dim1=1, dim2=2).add_(1)
    return R


def _entries(g: Tensor, K: Tensor, S: Tensor) -> Tensor:
    """The gradient of the entries from that of R (n, b, b)."""
    g_M = torch.bmm(S, g)
    g_S = torch.baddbmm(g_M, g, _inner(K, S).mT)
    # Of what S = K K gives to K only the skew part counts, and that is twice the product's with g_S + g_S^T.
    g_K = torch.add(g, g_M).mul_(2).sub_(torch.bmm(g_S + g_S.mT, K)).flatten(1)
    above, below = _above(K.shape[-1], K.device)
    return g_K.index_select(1, above).sub_(g_K.index_select(1, below))
