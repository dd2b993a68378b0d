"""Linear layers of a partitioned base that let go of their weight between the forward and the backward.

torch's own linear keeps a view of the weight for its backward, and with the view the storage that was gathered: the
whole base would stay on every rank from the forward to the backward. What is kept here is the parameter itself, whose
storage comes and goes as it is released and gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class RestingLinear(nn.Linear):
    """nn.Linear whose frozen weight rests in pieces while it is not used."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the weight's dtype."""
        trained = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if trained or not (torch.is_grad_enabled() and x.requires_grad) or _is_transformed(x):
            return F.linear(x, self.weight, self.bias)
        return _Product.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]


def _is_transformed(x: Tensor) -> bool:
    """Whether torch is to see the product itself: autocast, compilation, functional transforms."""
    return (
        torch.is_autocast_enabled(x.device.type)
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(W)
        return F.linear(x, W, b)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (W,) = ctx.saved_tensors
        return torch.mm(g.reshape(-1, g.shape[-1]), W).view(*g.shape[:-1], -1), None, None
