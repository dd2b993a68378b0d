"""A frozen layer whose input is turned block by block: OFT."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_dist.compiled import block_loop
from peft_dist.fused.node import Node
from peft_dist.fused.plain import flat, linear, shaped


def rotations(Qs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """(R, R^-T) for each of the entries Qs (n, b(b-1)/2), all of one block size: the blocks (n, b, b) of
    R = I + 2 K + 2 K^2 + 2 K^3 + K^4, K being the skew matrices of Q's entries. R^-T, which takes no gradient, is None
    where K is too large to have it cheaply, and on other devices than a CPU, where nothing is folded."""
    given = _Rotations.run(*Qs)
    Rs, Zs = given[: len(Qs)], given[len(Qs) :] or [None] * len(Qs)
    return list(zip(Rs, Zs, strict=True))


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
        size, rounding = _largest(T), torch.finfo(T.dtype).eps / 2
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


def _largest(T: Tensor) -> float:
    """The largest of the norms of the blocks T (n, b, b)."""
    return float(torch.linalg.vector_norm(T.flatten(1), dim=1).max())


class _Rotations(Node):
    @staticmethod
    def forward(ctx: Any, *Qs: Tensor) -> tuple[Tensor, ...]:
        series, sizes = _Series.of(skew(torch.cat(Qs))), [len(Q) for Q in Qs]
        R = series.turns()
        Z = series.transposed_inverse(R) if R.device.type == "cpu" else None
        Zs = () if Z is None else Z.split(sizes)
        ctx.save_for_backward(*series)
        ctx.sizes = sizes
        ctx.mark_non_differentiable(*Zs)
        ctx.set_materialize_grads(False)
        return *R.split(sizes), *Zs

    @staticmethod
    def gradients(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        series, sizes = _Series(*ctx.saved_tensors), ctx.sizes
        b = series.K.shape[-1]
        each = [
            series.K.new_zeros(size * b, b) if g is None else g for g, size in zip(gs, sizes, strict=False)
        ]
        return series.entries(torch.cat(each).view(-1, b, b)).split(sizes)


def turned(
    x: Tensor, parts: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor | None]], folds: bool = False
) -> tuple[Tensor, ...]:
    """(x diag(R)) W^T + b for each (W, b, R, R^-T) of `parts`, layers that take the same x, with the blocks R
    (n, b, b). Where it `folds`, the Ws may be turned in place of x, and are kept so until the backward: it is done
    where each R^-T is given and no W is larger than x."""
    folds = folds and all(Z is not None and W.numel() <= x.numel() for W, _, _, Z in parts)
    return (_Folded if folds else _Turned).run(x, *(t for part in parts for t in part))


class _Turned(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows, Ws, bs, Rs = flat(x), tensors[::4], tensors[1::4], tensors[2::4]
        ctx.save_for_backward(rows, *Ws, *Rs)
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return tuple([shaped(linear(_turn(rows, R), W, b), x) for R, W, b in zip(Rs, Ws, bs, strict=True)])

    @staticmethod
    def gradients(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, *kept = ctx.saved_tensors
        Ws, Rs, wanted, g_x = kept[: len(gs)], kept[len(gs) :], ctx.needs_input_grad, None
        each: list[Tensor | None] = []
        for i, (g, W, R) in enumerate(zip(gs, Ws, Rs, strict=True)):
            g_R = None
            if g is not None:
                g = torch.mm(g, W)
                if wanted[3 + 4 * i]:
                    g_R = _cross(rows, g, R)
                if wanted[0]:
                    g_x = _turn(g, R.mT, g_x)
            each += [None, None, g_R, None]
        return None if g_x is None else g_x.view(ctx.shape), *each


class _Folded(Node):
    """As above by V = W diag(R)^T: less to turn, and one turn less in the backward, where x^T (g V) gives the
    gradient of R times R^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows, Ws, bs, Rs, Zs = flat(x), *(tensors[i::4] for i in range(4))
        Vs = [_turn(W, R.mT) for W, R in zip(Ws, Rs, strict=True)]
        ctx.save_for_backward(rows, *Vs, *Zs)
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return tuple([shaped(linear(rows, V, b), x) for V, b in zip(Vs, bs, strict=True)])

    @staticmethod
    def gradients(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, *kept = ctx.saved_tensors
        Vs, Zs, wanted, g_x = kept[: len(gs)], kept[len(gs) :], ctx.needs_input_grad, None
        each: list[Tensor | None] = []
        for i, (g, V, Z) in enumerate(zip(gs, Vs, Zs, strict=True)):
            g_R = None
            if g is not None:
                g = torch.mm(g, V)
                if wanted[3 + 4 * i]:
                    g_R = torch.bmm(_cross(rows, g, Z), Z)
                if wanted[0]:
                    g_x = g if g_x is None else g_x.add_(g)
            each += [None, None, g_R, None]
        return None if g_x is None else g_x.view(ctx.shape), *each


def _blocks(rows: Tensor, R: Tensor) -> Tensor:
    return rows.view(len(rows), -1, R.shape[-1]).transpose(0, 1)


def _turn(rows: Tensor, R: Tensor, to: Tensor | None = None) -> Tensor:
    """rows turned, added to `to` in place where it is given."""
    given = torch.empty_like(rows) if to is None else to
    if given.is_contiguous() and block_loop.suits(R.shape[-1], rows, R):
        block_loop.turn(rows, R, given, adds=to is not None)
    elif to is None:
        torch.bmm(_blocks(rows, R), R, out=_blocks(given, R))
    else:
        torch.baddbmm(_blocks(to, R), _blocks(rows, R), R, out=_blocks(to, R))
    return given


def _cross(x: Tensor, g: Tensor, R: Tensor) -> Tensor:
    """(n, b, b): the blocks of x^T g that R's are."""
    b = R.shape[-1]
    return (
        block_loop.cross(x, g, b) if block_loop.suits(b, x, g) else torch.bmm(_blocks(x, R).mT, _blocks(g, R))
    )


def skew(Q: Tensor) -> Tensor:
    """Skew matrices (n, b, b) of the entries (n, b(b-1)/2) above their diagonals."""
    b = math.isqrt(2 * Q.shape[1]) + 1
    if b == 1:
        return Q.new_zeros(len(Q), 1, 1)
    places, signs = _places(b, Q.device, Q.dtype)
    return Q.index_select(1, places).mul_(signs).view(-1, b, b)


# Kept for later calls, which may be differentiated: no inference tensors, wherever the first call is.
@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _places(b: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which entry stands at each place of a skew matrix (b, b), and its sign; 0 on the diagonal."""
    above, below = _above(b, device)
    places = torch.zeros(b * b, dtype=torch.long, device=device)
    signs = torch.zeros(b * b, dtype=dtype, device=device)
    places[above] = places[below] = torch.arange(len(above), device=device)
    signs[above], signs[below] = 1, -1
    return places, signs


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _above(b: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the entries above the diagonal of a matrix (b, b) are, and their mirror images."""
    row, column = torch.triu_indices(b, b, 1, device=device)
    return row * b + column, column * b + row
