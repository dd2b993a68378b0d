"""Whole gradients of adapter tensors, wherever an engine takes them: for what looks at an adapter as a whole once a
step.

A tensor's own `.grad` is taken where it is there. A user's own DeepSpeed engine leaves none: at ZeRO-1 to 3 each
rank keeps a piece of it, and at stage 0 the step frees it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from peft_dist.sharding import gathered, is_partitioned, set_whole, whole_shape

_KEPT = "_peft_dist_keeps_gradient"
_SUMMED = "_peft_dist_sums_gradient"


def keep_gradient_whole(parameter: Tensor) -> None:
    """Every rank is to have the whole gradient before the optimizer's step, at any ZeRO stage."""
    setattr(parameter, _KEPT, True)


def keeps_gradient_whole(parameter: Tensor) -> bool:
    """Whether `keep_gradient_whole` was said of it."""
    return hasattr(parameter, _KEPT)


def sums_gradient(parameter: Tensor) -> None:
    """Its `.grad` is a sum over the ranks once its optimizer says so, and no other tensor ever is."""
    setattr(parameter, _SUMMED, True)


def is_held_by_zero(parameter: Tensor) -> bool:
    """Whether a user's own DeepSpeed engine keeps the parameter's values and gradients in a form of its own (ZeRO-1
    to 3)."""
    return is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")


class Gradients:
    """The gradients of watched parameters since they were last asked for."""

    def __init__(self) -> None:
        # By the parameter's id: its own gradient, or under ZeRO the sum over the backwards on this rank.
        self._latest: dict[int, Tensor] = {}
        self._watched: dict[int, Parameter] = {}

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Notes what backwards give these parameters from now on; those that are watched already stay so."""
        for parameter in parameters:
            if (
                isinstance(parameter, Parameter)
                and parameter.requires_grad
                and id(parameter) not in self._watched
            ):
                self._watched[id(parameter)] = parameter
                parameter.register_hook(lambda gradient, p=parameter: self._add(p, gradient))
                parameter.register_post_accumulate_grad_hook(self._note)

    def _add(self, parameter: Parameter, gradient: Tensor) -> None:
        if is_held_by_zero(parameter):
            before = self._latest.get(id(parameter))
            own = gradient.detach().clone()
            self._latest[id(parameter)] = own if before is None else before + own

    def _note(self, parameter: Tensor) -> None:
        if not is_held_by_zero(parameter) and parameter.grad is not None:
            self._latest[id(parameter)] = parameter.grad

    def taken(self, parameters: Iterable[Tensor]) -> dict[int, Tensor]:
        """By the parameter's id its whole gradient, none where there is none; a collective under ZeRO, where what was
        noted is averaged over the ranks, as the engine does, and forgotten."""
        found = {}
        for parameter in parameters:
            noted = self._latest.get(id(parameter))
            if is_held_by_zero(parameter):
                if not parameter.requires_grad:
                    continue
                mean = torch.zeros(whole_shape(parameter), dtype=parameter.dtype, device=parameter.device)
                if noted is not None:
                    mean.copy_(noted)
                dist.all_reduce(mean)
                found[id(parameter)] = mean / dist.get_world_size()
                self._latest.pop(id(parameter), None)
            elif parameter.grad is not None:
                found[id(parameter)] = parameter.grad
            elif noted is not None and not hasattr(parameter, _SUMMED):
                # Freed by now; an engine whose stage is 0 has averaged it in place.
                found[id(parameter)] = noted
        return found


@contextlib.contextmanager
def whole_view(parameters: Sequence[Tensor], gradients: Mapping[int, Tensor]) -> Iterator[dict[int, Tensor]]:
    """By the parameter's id the parameter itself, or, where an engine keeps it or its gradient elsewhere, a whole
    copy with its gradient. What was changed of a copy within the context is set afterwards."""
    shown: dict[int, Tensor] = {}
    with gathered(t for t in parameters if isinstance(t, Parameter)):
        for parameter in parameters:
            given = gradients.get(id(parameter))
            shown[id(parameter)] = parameter
            if is_held_by_zero(parameter) or (given is not None and parameter.grad is not given):
                shown[id(parameter)] = copy = parameter.detach().clone()
                copy.grad = given
    versions = {key: t._version for key, t in shown.items()}
    yield shown
    for parameter in parameters:
        now = shown[id(parameter)]
        if now is not parameter and now._version != versions[id(parameter)]:
            set_whole(parameter, now)
