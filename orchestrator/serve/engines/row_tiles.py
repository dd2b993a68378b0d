"""Operations whose rows do not depend on how many others there are.

A BLAS chooses its kernel by the number of rows, and kernels round differently. Within `RowTiles` every product
over rows of the batch runs in tiles of 16, the last filled up with zeros, so that a row's bits are its own. What is
left over when a tensor is cut into vectors goes through other functions of one number, which round differently
too: tensors are filled up to whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TILE = 16
# Elements of a piece: whole vectors of any width, and few enough that no second thread takes part of it.
_PIECE, _VECTORS = 16384, 128

_aten = torch.ops.aten


class RowTiles(TorchDispatchMode):
    """Within it matrix products on the CPU run in tiles of rows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _TILED.get(func)
        if own is not None:
            return own(*args, **(kwargs or {}))
        if func in _OF_ONE_NUMBER:
            return _in_whole_vectors(func, *args, **(kwargs or {}))
        if func in _MADE_OF_PRODUCTS:
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def tiled(a: Tensor, b: Tensor) -> Tensor:
    """a (rows, k) times b (k, n), in tiles of rows of a."""
    rows, columns = a.shape
    out = a.new_empty(rows, b.shape[1])
    for start in range(0, rows, TILE):
        stop = min(start + TILE, rows)
        tile = a.new_zeros(TILE, columns)
        tile[: stop - start] = a[start:stop]
        out[start:stop] = torch.mm(tile, b)[: stop - start]
    return out


def _in_whole_vectors(func: Any, x: Tensor, *more: Any, **options: Any) -> Tensor:
    """A function of each number by itself."""
    flat = x.contiguous().flatten()
    missing = -len(flat) % _VECTORS
    filled = torch.cat([flat, flat.new_zeros(missing)]) if missing else flat
    made = torch.cat([func(piece.clone(), *more, **options) for piece in filled.split(_PIECE)])
    return made[: len(flat)].view(x.shape)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return bias * beta + tiled(a, b) * alpha if beta != 1 or alpha != 1 else bias + tiled(a, b)


def _addmm_out(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    return out.copy_(_addmm(bias, a, b, beta=beta, alpha=alpha))


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([tiled(one, other) for one, other in zip(a, b, strict=True)])


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return bias * beta + _bmm(a, b) * alpha


def _grouped(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of a mixture's tokens, sorted by expert: a (rows, k), b (experts, k, n), offs (experts,) the ends of their
    rows; products of other shapes are none of a batch's."""
    if a.dim() != 2 or b.dim() != 3 or offs is None or bias is not None or out_dtype not in (None, a.dtype):
        return _aten._grouped_mm.default(a, b, offs, bias, out_dtype)  # type: ignore[no-any-return]
    out = a.new_zeros(len(a), b.shape[2])
    start = 0
    for weight, stop in zip(b, offs.tolist(), strict=True):
        out[start:stop] = tiled(a[start:stop], weight)
        start = stop
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = tiled(x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


_TILED: dict[Any, Callable[..., Tensor]] = {
    _aten.mm.default: tiled,
    _aten.addmm.default: _addmm,
    _aten.addmm.out: _addmm_out,
    _aten.bmm.default: _bmm,
    _aten.baddbmm.default: _baddbmm,
    _aten.linear.default: _linear,
    _aten._grouped_mm.default: _grouped,
}
_OF_ONE_NUMBER = {
    _aten.silu.default,
    _aten.gelu.default,
    _aten.sigmoid.default,
    _aten.tanh.default,
    _aten.exp.default,
    _aten.erf.default,
    _aten.cos.default,
    _aten.sin.default,
    _aten.pow.Tensor_Scalar,
    _aten.rsqrt.default,
    _aten.softplus.default,
}
_MADE_OF_PRODUCTS = {_aten.matmul.default, _aten.einsum.default}
