"""What the nodes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class Node(Function):
    """A node whose backward is not differentiable. Subclasses define `forward(ctx, ...)` and
    `gradients(ctx, g)`, where g is the gradient of what forward gave, one row each."""

    @classmethod
    def run(cls, *args: Any) -> Tensor:
        """`apply` past what it looks for in functional transforms: whoever calls has seen that there are
        none."""
        return super(Function, cls).apply(*args)  # type: ignore[misc]

    @classmethod
    def backward(cls, ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "adapters on plain layers cannot be differentiated twice: create_graph=True is not supported."
            )
        return cls.gradients(ctx, gradient.reshape(-1, gradient.shape[-1]))

    @staticmethod
    def gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of each argument, from that of the rows."""
        raise NotImplementedError
