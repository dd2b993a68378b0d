"""What requests to a registry's endpoints may name as their model."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.errors import RegistryError, closest
from orchestrator.registry import Registry

from ..desired import Desired
from ..naming import base_id

_SHOWN = 8


def askable(registry: Registry) -> list[str]:
    """The names of its adapters, and of the bases that they are of or that endpoints are up for, sorted."""
    names = set(registry.names())
    states = map(registry.endpoint_state, registry.endpoint_names())
    bases = [Desired.from_dict(state).base for state in states if state is not None]
    bases += [registry.get(f"{row.name}@{row.latest}").lineage.base for row in registry.adapters()]
    return sorted(names | {base_id(base) for base in bases})


def check_askable(registry: Registry, models: Iterable[str], *, force: bool = False) -> None:
    """Whether a key of these models alone opens anything.

    Args:
        force: take names that are still to come.

    Raises:
        RegistryError: one names a version, or nothing that is there.
    """
    models = list(models)
    for model in models:
        name = model.partition("@")[0]
        if name != model:
            raise RegistryError(
                f"'{model}' names a version, and a key is for a name with all its versions.",
                where="models",
                hint=f"Write '{name}'.",
            )
    if force:
        return
    there = askable(registry)
    for model in models:
        if model in there:
            continue
        if near := closest(model, there):
            which = f"Closest: '{near[0]}'."
        elif there:
            more = f" and {len(there) - _SHOWN} more" if len(there) > _SHOWN else ""
            which = f"There is {', '.join(there[:_SHOWN])}{more}."
        else:
            which = "The registry is empty."
        raise RegistryError(
            f"no adapter and no base is called '{model}'.",
            where="models",
            hint=f"{which} One that is still to come: --force.",
        )
