"""A frozen layer whose input is turned block by block: OFT."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from peft_dist.fused.node import Node
from peft_dist.fused.plain import flat, linear


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


def _turn(rows: Tensor, R: Tensor) -> Tensor:
    given = torch.empty_like(rows)
    torch.bmm(_blocks(rows, R), R, out=_blocks(given, R))
    return given


def turned_by_series(x: Tensor, W: Tensor, b: Tensor | None, Q: Tensor) -> Tensor:
    """`turned` by R = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 of the skew matrices of the entries Q (n, b(b-1)/2)."""
    return _TurnedBySeries.run(x, W, b, Q)


class _TurnedBySeries(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, Q: Tensor) -> Tensor:
        rows, K = flat(x), skew(Q)
        S = torch.bmm(K, K)
        R = _series(K, S)
        ctx.save_for_backward(rows, W, K, S, R)
        ctx.shape = x.shape
        return linear(_turn(rows, R), W, b).view(*x.shape[:-1], -1)

    @staticmethod
    def gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, W, K, S, R = ctx.saved_tensors
        g = torch.mm(g, W)
        g_Q = (
            _entries(torch.bmm(_blocks(rows, R).mT, _blocks(g, R)), K, S) if ctx.needs_input_grad[3] else None
        )
        g_x = _turn(g, R.mT).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return g_x, None, None, g_Q


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
