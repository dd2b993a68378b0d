"""One level of a wavelet's inverse transform: linear, so its backward needs the filters alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def synthesis(C: Tensor, filters: Tensor) -> Tensor:
    """The matrix whose four bands are the quarters of C, of even sizes.

    Args:
        filters: low and high pass (2, 1, length).
    """
    return _Synthesis.apply(C, filters)


class _Synthesis(Function):
    @staticmethod
    def forward(ctx: Any, C: Tensor, filters: Tensor) -> Tensor:
        ctx.filters = filters
        return _of_rows(_of_rows(_turned(C), filters).T, filters).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _turned(_back(_back(gradient.T, ctx.filters).T, ctx.filters)), None


def _turned(C: Tensor) -> Tensor:
    """C with its upper right and lower left quarters in each other's place: HF PEFT's right half is high along
    rows, its lower half along columns."""
    H, W = C.shape[0] // 2, C.shape[1] // 2
    return torch.cat([torch.cat([C[:H, :W], C[H:, :W]], 1), torch.cat([C[:H, W:], C[H:, W:]], 1)])


def _of_rows(C: Tensor, filters: Tensor) -> Tensor:
    """The transform along each row, whose halves are the low and the high band."""
    bands = C.unflatten(1, (2, -1))
    return F.conv_transpose1d(bands, filters, stride=2, padding=filters.shape[-1] - 2)[:, 0]


def _back(G: Tensor, filters: Tensor) -> Tensor:
    return F.conv1d(G[:, None], filters, stride=2, padding=filters.shape[-1] - 2).flatten(1)
