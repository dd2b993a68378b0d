"""Where the layers of a base hang, and the wrappers around them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_dist.adapted import Adapted, AdapterModule, bare
from peft_dist.base_layer import (
    ParameterLayer,
    kind_of,
)
from peft_dist.pauses import pause
from peft_dist.targets import (
    READ_BY_KERNELS,
    READ_BY_PARENT,
    BaseFacts,
)


@dataclass
class Place:
    """Where a layer of the base hangs: `parent._modules[key]`, wrapped or not."""

    name: str
    parent: nn.Module
    key: str
    module: nn.Module

    @property
    def layer(self) -> nn.Module:
        """The base's own layer."""
        return bare(self.module)

    def wrapper(self, kind: type[AdapterModule], parameter: str | None = None) -> AdapterModule | None:
        """The wrapper of this kind around the layer, or around one raw parameter of it, where there is
        one."""
        found = (each for each in self.wrappers() if isinstance(each, kind))
        return next((each for each in found if parameter_of(each) == parameter), None)

    def wrappers(self) -> Iterator[AdapterModule]:
        """The wrappers around the layer, the outermost first."""
        module: Any = self.module
        while isinstance(module, AdapterModule):
            yield module
            module = module.base_layer


def parameter_of(wrapper: Any) -> str | None:
    base = getattr(wrapper, "base", None)
    return base.key if isinstance(base, ParameterLayer) else None


def places(model: nn.Module) -> dict[str, Place]:
    """Every module of the base by its name in the bare base, wrappers looked through."""
    return {place.name: place for place in _walk(model, "", set())}


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[Place]:
    for key, child in module._modules.items():
        if child is None or id(child) in seen:
            continue
        pause()
        seen.add(id(child))
        name = f"{prefix}.{key}" if prefix else key
        place = Place(name, module, key, child)
        yield place
        yield from _walk(place.layer, name, seen)


def facts_of(model: Any, found: dict[str, Place]) -> BaseFacts:
    """What targets are chosen from."""
    output = asked(model, "get_output_embeddings")
    heads = {name for name, place in found.items() if output is not None and place.layer is bare(output)}
    kinds = {name: _kind_at(place) for name, place in found.items()}
    architecture = getattr(getattr(model, "config", None), "model_type", None)
    inputs = bare(asked(model, "get_input_embeddings"))
    embedding = next((name for name, place in found.items() if place.layer is inputs), None)
    return BaseFacts(type(model).__name__, kinds, frozenset(heads), architecture, embedding=embedding)


def _kind_at(place: Place) -> str:
    if isinstance(place.parent, nn.MultiheadAttention):
        return READ_BY_PARENT
    # Mamba's mixers and the like, which have a decay of their own.
    is_inner = hasattr(place.parent, "A_log") and place.key in ("conv1d", "dt_proj", "out_proj")
    if is_inner and f"self.{place.key}.weight" in _source(type(bare(place.parent)).forward):
        return READ_BY_KERNELS
    return kind_of(place.layer)


@functools.cache
def _source(forward: Any) -> str:
    try:
        return inspect.getsource(forward)
    except (OSError, TypeError):
        return ""


def asked(base: Any, getter: str) -> nn.Module | None:
    """The layer that a base names by a method, or None: transformers' convolutional models raise there."""
    try:
        return getattr(base, getter)() if hasattr(base, getter) else None
    except NotImplementedError:
        return None


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """(name in the bare base, wrapper) of every wrapped layer."""
    for place in places(model).values():
        for wrapper in place.wrappers():
            yield wrapper._site_name, wrapper


def remove_wrappers(model: nn.Module) -> None:
    """Puts the base's own layers back in the place of their wrappers."""
    for place in places(model).values():
        if isinstance(place.module, AdapterModule):
            place.parent._modules[place.key] = place.layer


def unwrap_empty(place: Place) -> None:
    parent, key = place.parent, place.key
    module: Any = place.module
    while isinstance(module, AdapterModule):
        inner: Any = module.base_layer
        if not module.adapters:
            parent._modules[key] = inner
        else:
            parent, key = module, "base_layer" if isinstance(module, Adapted) else "original_module"
        module = inner
