"""Running a partitioned module whose output no row takes: ranks that name different adapters must gather its
weight equally often, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def beside(given: Any, other: Any) -> Any:
    """`given` as it is; the backward also goes through `other`, with a gradient of zero."""
    if isinstance(given, Tensor):
        return Beside.apply(given, other)
    return type(given)((beside(given[0], other[0]), *given[1:]))


class Beside(torch.autograd.Function):
    """y as it is; the backward also goes through what made `bare`, with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bare: Tensor) -> Tensor:
        ctx.shape = bare.shape
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, gradient.new_zeros(ctx.shape)
