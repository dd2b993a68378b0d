"""What the nodes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from peft_dist.fused.plain import flat


class Node(Function):
    """A node whose backward is not differentiable. Subclasses define `forward(ctx, ...)` and
    `gradients(ctx, g, ...)`, where g is the gradient of what forward gave, one row each."""

    @classmethod
    def run(cls, *args: Any) -> Any:
        """`apply` past what it looks for in functional transforms: whoever calls has seen that there are
        none."""
        return super(Function, cls).apply(*args)  # type: ignore[misc]

    @classmethod
    def backward(cls, ctx: Any, *gs: Tensor | None) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "adapters on plain layers cannot be differentiated twice: create_graph=True is not supported."
            )
        return cls.gradients(ctx, *(None if g is None else flat(g) for g in gs))

    @staticmethod
    def gradients(ctx: Any, *gs: Any) -> tuple[Tensor | None, ...]:
        """The gradient of each argument, from those of the rows that forward gave."""
        raise NotImplementedError
