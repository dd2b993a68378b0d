"""Which adapters serve and are trained, and those that go."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peft_dist.adapted import Adapted, Replaced
from peft_dist.errors import AdapterError
from peft_dist.inject.places import (
    adapter_modules,
    places,
    unwrap_empty,
)
from peft_dist.pauses import pause


def check_together(model: nn.Module, names: Sequence[str]) -> None:
    """Whether the named adapters can be active at once: one alone can stand in a module's place, and their
    methods may have more to say.

    Raises:
        AdapterError: two do, or one does where another sits on the same module; names it.
    """
    for place in places(model).values() if len(names) > 1 else ():
        for each in place.wrappers():
            here = {name: each.methods[name] for name in names if name in each.methods}
            for name, method in here.items():
                method.check_together(place.name, [other for key, other in here.items() if key != name])
        wrapper = place.wrapper(Replaced)
        if wrapper is None:
            continue
        stand_in = [name for name in names if name in wrapper.methods]
        under = place.wrapper(Adapted)
        beside = [
            name for name in names if under is not None and name in under.methods and name not in stand_in
        ]
        if len(stand_in) > 1 or (stand_in and beside):
            raise AdapterError(
                f"{place.name}: {stand_in[0]!r} stands in the module's place, so {(stand_in[1:] + beside)[0]!r} "
                "cannot act on it too. Activate one of them, or leave the module out of one's targets."
            )


def activate(model: nn.Module, names: list[str]) -> None:
    """Makes the named adapters serve rows that name none, in this order."""
    for _, module in adapter_modules(model):
        module.active_adapters = list(names)


def set_requires_grad(model: nn.Module, names: list[str], requires_grad: bool) -> None:
    """Lets the named adapters' tensors be trained, or not; others stay as they are. Frozen ones stay
    frozen."""
    for _, module in adapter_modules(model):
        for name in names:
            module.let_train(name, requires_grad)


def delete(model: nn.Module, adapter: str) -> None:
    """Removes an adapter, and the wrappers that are left without any.

    Raises:
        AdapterError: it is merged; nothing is removed.
    """
    modules = [(name, module) for name, module in adapter_modules(model) if adapter in module.adapters]
    for name, module in modules:
        if adapter in module.merged_adapters:
            raise AdapterError(f"{name}: adapter {adapter!r} is merged. Unmerge it before deleting it.")
    for _, module in modules:
        pause()
        module.delete(adapter)
    for place in places(model).values():
        unwrap_empty(place)
