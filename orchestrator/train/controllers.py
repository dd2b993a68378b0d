"""What acts on the adapter as a whole once a step (AdaLoRA's budget): called by the loop, kept in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PREFIX = "controller/"
"""What its tensors' names begin with among those of the optimizer."""


class Controllers:
    """The controllers of a model's adapters; most methods have none."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._by_adapter: dict[str, Any] = getattr(getattr(model, "base_model", None), "controllers", {})

    @property
    def are_there(self) -> bool:
        """Whether any adapter has one."""
        return bool(self._by_adapter)

    def after_backward(self, step: int, scale: float) -> None:
        """Between the backward and the optimizer's step. The gradients, whole on every rank, are divided by the
        scale of an fp16 loss; where one of them is not finite nothing else is done.

        Args:
            step: from 1.
        """
        gradients = [p.grad for p in self._model.parameters() if p.requires_grad and p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self._model.after_backward(step)

    def after_step(self, step: int) -> None:
        """After the optimizer's step, where it changed anything."""
        if self._by_adapter:
            self._model.after_step(step)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs of them, by names of its own."""
        return {
            f"{_PREFIX}{adapter}/{name}": tensor
            for adapter, controller in self._by_adapter.items()
            for name, tensor in controller.state().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave; other names are passed over."""
        for adapter, controller in self._by_adapter.items():
            prefix = f"{_PREFIX}{adapter}/"
            own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            controller.load_state(own)


def without_controllers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's own tensors among those of a checkpoint."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(_PREFIX)}
