"""What acts on the adapter as a whole once a step (AdaLoRA's budget): called by the loop, kept in checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .seat import ADAPTER, Seat

_PREFIX = "controller/"
"""What its tensors' names begin with among those of the optimizer."""


class Controllers:
    """The controller of a run's adapter; most methods have none.

    Args:
        trained: the adapter's parameters.
    """

    def __init__(self, seat: Seat, trained: Iterable[Tensor]) -> None:
        self._seat, self._trained = seat, list(trained)
        self._model: Any = seat.model

    @property
    def are_there(self) -> bool:
        """Whether there is one."""
        return self._seat.controller() is not None

    def after_backward(self, step: int, scale: float) -> None:
        """Between the backward and the optimizer's step. The gradients, whole on every rank, are divided by the
        scale of an fp16 loss; where one of them is not finite nothing else is done.

        Args:
            step: from 1.
        """
        gradients = [p.grad for p in self._trained if p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            with self._seat.serving():
                self._model.after_backward(step)

    def after_step(self, step: int) -> None:
        """After the optimizer's step, where it changed anything."""
        if self.are_there:
            with self._seat.serving():
                self._model.after_step(step)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs of it, by names of its own."""
        controller = self._seat.controller()
        state = {} if controller is None else controller.state()
        return {f"{_PREFIX}{ADAPTER}/{name}": tensor for name, tensor in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave; other names are passed over."""
        prefix, controller = f"{_PREFIX}{ADAPTER}/", self._seat.controller()
        if controller is not None:
            own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            controller.load_state(own)


def without_controllers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's own tensors among those of a checkpoint."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(_PREFIX)}
