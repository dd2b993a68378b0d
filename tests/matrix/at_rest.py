"""Bytes of a base that a process holds: parameters, pieces, packed codes, statistics, what kernels keep beside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from peft_dist.pooled import PooledModule

# The objects by which DeepSpeed and bitsandbytes keep tensors beside a module's own.
_HOLDERS = ("QuantState", "MatmulLtState")


def held(model: nn.Module) -> int:
    """The bytes of all tensors that hang on the base's own modules now, each counted once."""
    seen: dict[tuple[int, int], int] = {}
    adapters = _of_adapters(model)
    for module in _own_modules(model):
        for tensor in _of_module(module):
            size = tensor.numel() * tensor.element_size()
            if size and id(tensor) not in adapters:
                seen[tensor.data_ptr(), size] = size
    return sum(seen.values())


def share(whole: nn.Module, world: int) -> int:
    """What one of `world` ranks may hold of a base that is whole here: its share of every parameter, and the
    buffers and statistics of quantisation."""
    allowed = 0
    parameters = {
        id(p): p for module in _own_modules(whole) for p in module._parameters.values() if p is not None
    }
    codes = {p.data_ptr() for p in parameters.values()}
    for parameter in parameters.values():
        allowed += -(-parameter.numel() // world) * parameter.element_size()
    seen: dict[int, int] = {}
    for module in _own_modules(whole):
        for tensor in _of_module(module):
            if tensor.data_ptr() not in codes:
                seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return allowed + sum(seen.values())


def _own_modules(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if not isinstance(module, PooledModule))


def _of_adapters(model: nn.Module) -> set[int]:
    pooled = [module for module in model.modules() if isinstance(module, PooledModule)]
    return {id(t) for module in pooled for name in module.adapters for t in module.tensors(name).values()}


def _of_module(module: nn.Module) -> Iterator[Tensor]:
    """The tensors of a module, not of its children, and what hangs on them."""
    beside = [value for key, value in vars(module).items() if not key.startswith("_")]
    for value in (*module._parameters.values(), *module._buffers.values(), *beside):
        yield from _tensors(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        for inner in vars(value).values() if hasattr(value, "__dict__") else ():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
    elif type(value).__name__ in _HOLDERS:
        for key, inner in vars(value).items():
            # Which columns of the latest input had outliers: of the input, not of the base.
            if key != "idx":
                yield from _tensors(inner)
