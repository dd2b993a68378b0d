"""A frozen layer whose input is turned block by block: OFT."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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


def turned_by_series(
    x: Tensor, parts: Sequence[tuple[Tensor, Tensor | None, Tensor]], folds: bool = False
) -> tuple[Tensor, ...]:
    """`turned` by R = I + 2 K + 2 K^2 + 2 K^3 + K^4 for each (W, b, Q) of `parts`, layers that take the same
    x; K are the skew matrices of the entries Q (n, b(b-1)/2). Where it `folds`, the Ws may be turned in place of
    x, and are kept so until the backward: it is done where none is larger than x."""
    Qs, tensors = [part[2].detach() for part in parts], [t for part in parts for t in part]
    series = _Series.of(skew(Qs[0] if len(Qs) == 1 else torch.cat(Qs)))
    R = series.turns()
    folds = folds and all(part[0].numel() <= x.numel() for part in parts)
    Z = series.transposed_inverse(R) if folds else None
    return (
        _TurnedBySeries.run(x, R, *series, *tensors) if Z is None else _Folded.run(x, R, Z, *series, *tensors)
    )


class _Series(NamedTuple):
    """R = I + 2 K + 2 K^2 + 2 K^3 + K^4 (n, b, b) of skew K as (I + S) N, with S = K K and N = I + 2 K + S."""

    K: Tensor
    S: Tensor
    N: Tensor

    @classmethod
    def of(cls, K: Tensor) -> _Series:
        S = torch.bmm(K, K)
        N = torch.add(S, K, alpha=2)
        N.diagonal(dim1=1, dim2=2).add_(1)
        return cls(K, S, N)

    def turns(self) -> Tensor:
        return torch.baddbmm(self.N, self.S, self.N)

    def transposed_inverse(self, R: Tensor) -> Tensor | None:
        """R^-T, where K is so small that a few terms give it to rounding. Waits for the device."""
        # K, S and R commute, and R R^T = (I - T)^2 with T = S S: so R^-T = (I + 2 T + 3 T^2 + ...) R.
        T = torch.bmm(self.S, self.S)
        size, rounding = float(torch.linalg.vector_norm(T)), torch.finfo(T.dtype).eps / 2
        # What n terms leave out is at most (n + 2) |T|^n, where |T| < 0.1.
        num = next((n for n in range(2, _MOST_TERMS + 1) if (n + 2) * size**n <= rounding), None)
        if num is None:
            return None
        Z = torch.baddbmm(R, T, R, beta=num - 1, alpha=num)
        for n in range(num - 2, 0, -1):
            Z = torch.baddbmm(R, T, Z, beta=n)
        return Z

    def entries(self, g: Tensor) -> Tensor:
        """The gradient of the entries from that of R."""
        K, S, N = self
        g_N = torch.baddbmm(g, S, g)
        g_S = torch.baddbmm(g_N, g, N.mT)
        # Of what S = K K gives to K only the skew part counts, and that is twice the product's with g_S + g_S^T.
        g_K = torch.baddbmm(g_N, g_S + g_S.mT, K, beta=2, alpha=-1).flatten(1)
        above, below = _above(K.shape[-1], K.device)
        return g_K.index_select(1, above).sub_(g_K.index_select(1, below))


_MOST_TERMS = 8


class _TurnedBySeries(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows, series, Ws, bs = flat(x), tensors[:3], tensors[3::3], tensors[4::3]
        ctx.save_for_backward(rows, R, *series, *Ws)
        ctx.shape, ctx.num_blocks = x.shape, len(R) // len(Ws)
        ctx.set_materialize_grads(False)
        Rs = R.split(ctx.num_blocks)
        return tuple([shaped(linear(_turn(rows, R), W, b), x) for R, W, b in zip(Rs, Ws, bs, strict=True)])

    @staticmethod
    def gradients(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, R, K, S, N, *Ws = ctx.saved_tensors
        num, wants_x, wants_Qs = ctx.num_blocks, ctx.needs_input_grad[0], ctx.needs_input_grad[7::3]
        g_R, trains, g_x = torch.zeros_like(R) if None in gs else torch.empty_like(R), any(wants_Qs), None
        across = _blocks(rows, R).mT
        for g, W, R_own, g_own in zip(gs, Ws, R.mT.split(num), g_R.split(num), strict=True):
            if g is None:
                continue
            g = torch.mm(g, W)
            if trains:
                torch.bmm(across, _blocks(g, R), out=g_own)
            if wants_x:
                g_x = _turn(g, R_own, g_x)
        g_Qs = _Series(K, S, N).entries(g_R).split(num) if trains else [None] * len(gs)
        return None if g_x is None else g_x.view(ctx.shape), *[None] * 4, *_each(g_Qs, wants_Qs)


class _Folded(Node):
    """As above by V = W diag(R)^T: less to turn, and one turn less in the backward, where x^T (g V) gives the
    gradient of R times R^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, Z: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows, series, Ws, bs = flat(x), tensors[:3], tensors[3::3], tensors[4::3]
        ctx.shape, ctx.num_blocks = x.shape, len(R) // len(Ws)
        Vs = [_turn(W, R_own) for W, R_own in zip(Ws, R.mT.split(ctx.num_blocks), strict=True)]
        ctx.save_for_backward(rows, Z, *series, *Vs)
        ctx.set_materialize_grads(False)
        return tuple([shaped(linear(rows, V, b), x) for V, b in zip(Vs, bs, strict=True)])

    @staticmethod
    def gradients(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, Z, K, S, N, *Vs = ctx.saved_tensors
        num, wants_x, wants_Qs = ctx.num_blocks, ctx.needs_input_grad[0], ctx.needs_input_grad[8::3]
        P, trains, g_x = torch.zeros_like(Z) if None in gs else torch.empty_like(Z), any(wants_Qs), None
        across = _blocks(rows, Z).mT
        for g, V, P_own in zip(gs, Vs, P.split(num), strict=True):
            if g is None:
                continue
            g = torch.mm(g, V)
            if trains:
                torch.bmm(across, _blocks(g, Z), out=P_own)
            if wants_x:
                g_x = g if g_x is None else g_x.add_(g)
        g_Qs = _Series(K, S, N).entries(torch.bmm(P, Z)).split(num) if trains else [None] * len(gs)
        return None if g_x is None else g_x.view(ctx.shape), *[None] * 5, *_each(g_Qs, wants_Qs)


def _each(g_Qs: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of (W, b, Q) of each part."""
    return [
        t for g, is_wanted in zip(g_Qs, wanted, strict=True) for t in (None, None, g if is_wanted else None)
    ]


def skew(Q: Tensor) -> Tensor:
    """Skew matrices (n, b, b) of the entries (n, b(b-1)/2) above their diagonals."""
    b = math.isqrt(2 * Q.shape[1]) + 1
    if b == 1:
        return Q.new_zeros(len(Q), 1, 1)
    places, signs = _places(b, Q.device, Q.dtype)
    return Q.index_select(1, places).mul_(signs).view(-1, b, b)


@functools.lru_cache(maxsize=64)
def _places(b: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which entry stands at each place of a skew matrix (b, b), and its sign; 0 on the diagonal."""
    above, below = _above(b, device)
    places = torch.zeros(b * b, dtype=torch.long, device=device)
    signs = torch.zeros(b * b, dtype=dtype, device=device)
    places[above] = places[below] = torch.arange(len(above), device=device)
    signs[above], signs[below] = 1, -1
    return places, signs


@functools.lru_cache(maxsize=64)
def _above(b: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the entries above the diagonal of a matrix (b, b) are, and their mirror images."""
    row, column = torch.triu_indices(b, b, 1, device=device)
    return row * b + column, column * b + row
