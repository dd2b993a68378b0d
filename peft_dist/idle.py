"""Adapters that no rank used since a step of a user's own engine: its next step leaves them, and what its optimizer
knows of them, as they are.

An engine steps over all that it trains as over one tensor, where a gradient of zero still decays a weight and a
momentum.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Idle:
    """Which adapters an engine's next step is about.

    Attributes:
        watches: whether steps are watched by now; then every forward must say what it uses.
    """

    def __init__(self) -> None:
        self.watches = False
        self._parameters: dict[Parameter, str] = {}
        self._used: set[str] = set()
        # Whether a step of them is under way, and whether one was made since the last backward.
        self._steps = self._stepped = False
        self._kept: list[tuple[Tensor, Tensor]] = []
        # Of tensors of an adapter's own that the optimizer has not met: those that get a state now.
        self._unmet: list[Tensor] = []

    def watch(self, parameters: Mapping[Parameter, str]) -> None:
        """From now on steps of any optimizer leave alone what of the parameters, each with its adapter, is not used."""
        self._parameters = dict(parameters)
        if not self.watches:
            self.watches = True
            mine = weakref.ref(self)
            before = register_optimizer_step_pre_hook(lambda optimizer, *_: _call(mine, "_before", optimizer))
            after = register_optimizer_step_post_hook(lambda optimizer, *_: _call(mine, "_after", optimizer))
            for handle in (before, after):
                weakref.finalize(self, handle.remove)

    def use(self, names: set[str]) -> None:
        """Notes adapters that have a gradient on some rank; to be called in each backward."""
        if self._stepped:
            self._used, self._stepped = set(), False
        self._used |= names

    def _before(self, optimizer: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter, adapter in self._parameters.items():
            part = _part(parameter, held)
            if part is None:
                continue
            self._steps = True
            if adapter in self._used:
                continue
            tensor, first, size = part
            state = optimizer.state.get(tensor, {})
            known = [t for t in state.values() if isinstance(t, Tensor)]
            if tensor is parameter:
                # Nobody else's: the count of its steps too, and that it has none.
                views = [tensor.detach(), *known]
                self._unmet += [] if state else [tensor]
            else:
                alike = (t for t in (tensor, *known) if t.shape == tensor.shape)
                views = [t.detach().narrow(0, first, size) for t in alike]
            self._kept += [(view, view.clone()) for view in views]

    def _after(self, optimizer: Any) -> None:
        with torch.no_grad():
            for view, value in self._kept:
                view.copy_(value)
        for tensor in self._unmet:
            optimizer.state.pop(tensor, None)
        self._stepped, self._steps = self._stepped or self._steps, False
        self._kept, self._unmet = [], []


def _call(idle: weakref.ref[Idle], what: str, optimizer: Any) -> None:
    if (found := idle()) is not None:
        getattr(found, what)(optimizer)


def _part(parameter: Any, held: Sequence[Tensor]) -> tuple[Tensor, int, int] | None:
    """Where an optimizer that holds these tensors keeps the parameter: in which of them, from which element on, and how
    many; None where this rank's does not."""
    if any(tensor is parameter for tensor in held):
        return parameter, 0, parameter.numel()
    if (engine := getattr(parameter, "_z3_optimizer", None)) is not None:
        group, first, size = engine.grad_position[engine.get_param_id(parameter)]
        flat = engine.fp32_partitioned_groups_flat[group]
        return (flat, first, size) if any(tensor is flat for tensor in held) else None
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    place, storage = mapping.get_hp_fragment_address(), mapping.hp_fragment.untyped_storage().data_ptr()
    found = (tensor for tensor in held if tensor.untyped_storage().data_ptr() == storage)
    return next(((tensor, place.start, place.numel) for tensor in found), None)
