"""One place in a forward's graph through which all gradients of adapters go, under a user's own DeepSpeed engine.

Such an engine (ZeRO-1 to 3) reduces each tensor's gradient when it comes. Ranks whose rows name different adapters
would have other tensors, in another order, and reduce them with one another; and what gets no gradient at stage 3
is stepped by that of the step before. Here every trained tensor of every adapter gets one in each backward, on every
rank, in one order, zero where no row used it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from peft_dist.beside import beside
from peft_dist.errors import ShardingError
from peft_dist.foreign_engine import can_be, trained_by_engine
from peft_dist.idle import Idle
from peft_dist.ranks import on_any_rank
from peft_dist.sharding import first_layers, gathered, is_partitioned, whole_until_backward_ends


class Joint:
    """The tensors that adapters run with in one forward, in the place of the Parameters of an engine.

    Making one is a collective where the engine has them in pieces: they are whole from here to the backward.

    Args:
        trained: all that an engine trains of adapters, each with its adapter, in one order on every rank; not empty.
        frozen: what it only keeps of them in pieces.
        used: the adapters that this rank's rows name. idle: is told in the backward which any rank's do.
    """

    def __init__(
        self, trained: Mapping[Parameter, str], frozen: Sequence[Parameter], used: Collection[str], idle: Idle
    ) -> None:
        idle.watch(trained)
        used = on_any_rank(used, dict.fromkeys(trained.values()), next(iter(trained)).device)
        with gathered([*trained, *frozen]):
            self._token, *views = _Joined.apply(functools.partial(idle.use, used), *trained)
            views += [parameter.detach() for parameter in frozen]
        whole = zip([*trained, *frozen], views, strict=True)
        self._views = {id(parameter): view for parameter, view in whole}

    def of(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """`tensors` by the same names, with what a layer is to compute with in the place of Parameters."""
        return {name: self._views.get(id(tensor), tensor) for name, tensor in tensors.items()}

    def ends_in(self, outputs: Any) -> Any:
        """What a model gives, so that a backward from any of its tensors gives the gradients, also where none of
        this rank's rows used an adapter."""
        if isinstance(outputs, Tensor):
            return beside(outputs, self._token) if outputs.is_floating_point() else outputs
        if isinstance(outputs, Mapping):
            for name, value in list(outputs.items()):
                if isinstance(value, Tensor):
                    outputs[name] = self.ends_in(value)  # type: ignore[index]
        elif isinstance(outputs, tuple):
            return (
                type(outputs)(*map(self.ends_in, outputs))
                if hasattr(outputs, "_fields")
                else tuple(map(self.ends_in, outputs))
            )
        return outputs

    @contextlib.contextmanager
    def beginning_in(self, base: nn.Module) -> Iterator[None]:
        """Within the context the backward goes through every layer of `base`, down to those that take its input: an
        engine that keeps weights in pieces gathers them for it, on every rank or on none."""
        hooks = [layer.register_forward_hook(self._begin) for layer in first_layers(base)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, layer: nn.Module, args: Any, output: Any) -> Any:
        return self.ends_in(output) if torch.is_grad_enabled() else output


def joined(
    around: Sequence[nn.Module],
    modules: Iterable[nn.Module],
    tensors: Iterable[tuple[str, Tensor]],
    used: Collection[str],
    idle: Idle,
) -> Joint | None:
    """What adapters run with in the forward that begins now; None where no engine of a user's own trains any of
    `tensors`.

    Args:
        around: what an engine may have been built around.
        modules: those of the base that gradient checkpointing may run again.
        tensors: of all adapters, each after its adapter, in one order on every rank.
        used, idle: as `Joint` has them.

    Raises:
        ShardingError: gradient checkpointing is of the kind that runs a backward for each layer by itself.
    """
    if not torch.is_grad_enabled() or not can_be():
        return None
    parameters = {t: adapter for adapter, t in tensors if isinstance(t, Parameter)}
    trained = trained_by_engine(around, parameters)
    if not trained:
        return None
    for module in modules:
        run = module.__dict__.get("_gradient_checkpointing_func")
        keywords = getattr(getattr(run, "run", run), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and keywords.get("use_reentrant"):
            raise ShardingError(
                "a DeepSpeed engine of your own trains adapters that rows name, or of which one adds to the loss, and "
                "gradient checkpointing has use_reentrant=True, which gives each layer's gradients by themselves: "
                "ranks would reduce different ones with one another. Enable it with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
    return Joint(
        {p: parameters[p] for p in trained},
        [p for p in parameters if is_partitioned(p) and not p.requires_grad],
        used,
        idle,
    )


class _Joined(Function):
    """A zero, and each Parameter's own values; hands every Parameter its gradient at once."""

    @staticmethod
    def forward(ctx: Any, told: Callable[[], None], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.parameters, ctx.told = parameters, told
        return parameters[0].new_zeros(()), *(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, _: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.told()
        # A gradient is put on a tensor of its own shape.
        whole_until_backward_ends(ctx.parameters)
        return None, *gradients
