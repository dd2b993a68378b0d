"""Modules that take the same input one after another, as a block's query, key and value do."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist import saved_tensors


class Siblings:
    """Learns which modules take the same tensor in a row, and keeps what was computed for those whose turn is
    still to come.

    What is learned holds until it is wrong once: a module that then takes another tensor, or is left out,
    computes for itself. Nothing is learned or used while autograd's saved tensors are hooked (activation
    checkpointing wants a recomputed forward to save just what the first one did).
    """

    def __init__(self) -> None:
        self._followers: dict[nn.Module, tuple[nn.Module, ...]] = {}
        self._row: list[nn.Module] = []
        self._input: Any = _Input(None)
        self._leader: nn.Module | None = None
        self._computed: dict[nn.Module, Tensor] = {}

    def __reduce__(self) -> Any:
        """A copy of a model learns anew."""
        return Siblings, ()

    def computed_for(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """What was computed for `module` when another took x, if it was."""
        if module not in self._computed:
            return None
        if self._input.is_(x):
            return self._computed.pop(module)
        self._forget()
        return None

    def after(self, module: nn.Module, x: Tensor) -> Sequence[Any]:
        """The modules that are to take x next, after `module`, as far as is known."""
        if self._computed:
            self._forget()
        if saved_tensors.are_hooked():
            return ()
        if followers := self._followers.get(module):
            self._leader, self._row, self._input = module, [], _Input(x)
            return followers
        # One that takes it again begins another run of the model on the same tensor.
        if not self._input.is_(x) or module in self._row:
            self._row, self._input = [], _Input(x)
        self._row.append(module)
        self._followers[self._row[0]] = tuple(self._row[1:])
        return ()

    def keep(self, computed: dict[nn.Module, Tensor]) -> None:
        """What was computed of the input that `after` was last asked for."""
        self._computed = computed

    def _forget(self) -> None:
        self._followers.pop(self._leader, None)  # type: ignore[arg-type]
        self._computed, self._row = {}, []


class _Input:
    """A tensor as it was, without keeping it alive."""

    def __init__(self, x: Tensor | None) -> None:
        self._x = None if x is None else weakref.ref(x)
        self._state = None if x is None else _state(x)

    def is_(self, x: Tensor) -> bool:
        return self._x is not None and self._x() is x and self._state == _state(x)


def _state(x: Tensor) -> tuple[int, bool]:
    return saved_tensors.version(x), torch.is_grad_enabled()
