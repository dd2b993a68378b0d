"""Adapters on the meta device, and their start once the base has its values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_dist.adapted import AdapterModule
from peft_dist.base_layer import Layer
from peft_dist.errors import AdapterError
from peft_dist.pooled import PooledModule, outer_modules
from peft_dist.sharding import is_partitioned


def start_waiting(model: nn.Module) -> list[str]:
    """Starts the adapters that rest on the meta device; to be called on every rank once the base has its values.

    Their Parameters stay the ones that they are. A start that reads the base runs gathered; all ranks go on from
    rank 0's values. Adapters that have values are left.

    Args:
        model: a model with adapters, or a base with some in it; whole, quantised or partitioned.

    Returns:
        The adapters that were started.

    Raises:
        AdapterError: a layer of theirs is on the meta device itself; nothing is changed.
    """
    waiting = [
        (module, name) for module in _holders(model) for name in module.adapters if module.is_waiting(name)
    ]
    doors = [_door(model, module, name) for module, name in waiting]
    for (_, name), door in zip(waiting, doors, strict=True):
        if door.device.type == "meta":
            raise AdapterError(
                f"adapter {name!r} cannot start: {door.site.name!r} of the base is on the meta device. Give the base "
                "its values first: peft_dist.load_base(..., into=model)."
            )
    for (module, name), door in zip(waiting, doors, strict=True):
        module.materialise(name, door.device)
    for (module, name), door in zip(waiting, doors, strict=True):
        begin: Callable[[str, Layer], None] | None = getattr(module, "begin", None)
        if begin is None:
            module.fill(name)
        else:
            begin(name, door)
    _share([t for module, name in waiting for t in module.tensors(name).values()])
    # The base is changed by what all ranks have in common.
    for (module, name), door in zip(waiting, doors, strict=True):
        if isinstance(module, AdapterModule):
            module.replace_base(name, door)
        module.take_in(name)
        module.unite(name)
    return list(dict.fromkeys(name for _, name in waiting))


def start_when_partitioned(model: nn.Module) -> None:
    """Lets adapters on meta start when a DeepSpeed engine takes the other parameters of a partitioned base in: it
    moves no such model to a device, which would have them start."""
    for parameter in model.parameters():
        if is_partitioned(parameter) and hasattr(parameter, "convert_to_zero_parameters"):
            _start_before(parameter, model)


def _start_before(parameter: Any, model: nn.Module) -> None:
    convert = parameter.convert_to_zero_parameters

    def started(param_list: Any) -> None:
        start_waiting(model)
        convert(param_list=param_list)

    parameter.convert_to_zero_parameters = started


def leaves_meta(fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether what `nn.Module._apply` is to do would move tensors off the meta device."""
    try:
        fn(torch.empty(0, device="meta"))
    except NotImplementedError:
        return True
    return False


def check_started(model: nn.Module, given: Iterable[Tensor]) -> None:
    """Raises AdapterError where a model is given values and an adapter that serves has none."""
    if all(t.is_meta for t in given):
        return
    for module in _holders(model):
        if not getattr(module, "disabled", False):
            for name in module.adapters:
                if name in getattr(module, "active_adapters", ()):
                    module.check_filled(name)


def _holders(model: Any) -> list[PooledModule]:
    """Modules with adapters' tensors; those that layers share come before the layers."""
    found = [module for _, module in outer_modules(model) if isinstance(module, PooledModule)]
    return sorted(found, key=lambda module: isinstance(module, AdapterModule))


def _door(model: Any, module: Any, adapter: str) -> Layer:
    """The layer that a holder's tensors belong to; the first of an adapter's where they belong to all."""
    if hasattr(type(module), "base") or "base" in vars(module):
        return module.base
    return next(iter(module._adapters.sites[adapter].values())).base


def _share(tensors: Sequence[Tensor]) -> None:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    kinds = dict.fromkeys((t.dtype, t.device) for t in tensors)
    for kind in kinds:
        alike = [t.detach() for t in tensors if (t.dtype, t.device) == kind]
        flat = torch.cat([t.reshape(-1) for t in alike])
        dist.broadcast(flat, src=0)
        for t, part in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
            t.copy_(part.view_as(t))
