"""The registry's adapters: listed, named, brought in and out, measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import wiring
from ..adapter_folder import check_adapter
from ..cluster import load_cluster
from ..errors import ModelError, RegistryError, SpecError, closest
from ..identity import base_identity
from ..lineage import Lineage
from ..registry import AdapterRow, AdapterVersion, check_name
from ..spec.load import load_job_mapping
from ..spec.tasks import TASKS
from .found import registry_of


def registry_url(cluster: str | None = None) -> str:
    """Which registry a command reads."""
    return load_cluster(cluster).registry


def adapters(*, cluster: str | None = None) -> list[AdapterRow]:
    """One row an adapter."""
    return registry_of(cluster).adapters()


def versions(name: str, *, cluster: str | None = None) -> list[AdapterVersion]:
    """An adapter's versions, the oldest first.

    Raises:
        RegistryError: there is no such adapter.
    """
    registry = registry_of(cluster)
    found = registry.versions(name)
    if not found:
        if "@" in name:
            raise RegistryError(f"'{name}' names one version.", hint=f"See it: raypeft show {name}")
        check_name(name)
        registry.resolve(f"{name}@1")
    return found


def show(ref: str, *, cluster: str | None = None) -> AdapterVersion:
    """A version with its lineage."""
    return registry_of(cluster).get(ref)


def alias(ref: str, alias: str, *, cluster: str | None = None) -> AdapterVersion:
    """Points `alias` at a version; endpoints follow within about a second."""
    registry = registry_of(cluster)
    name, version = registry.resolve(ref)
    return registry.set_alias(name, version, alias)


def register(
    source: str, name: str, *, base: str | None = None, cluster: str | None = None
) -> AdapterVersion:
    """Registers an adapter that was trained elsewhere: a directory in HF PEFT's layout or a hub id.

    Args:
        base: its base model; what the adapter's config names where None.

    Raises:
        ModelError: not a whole adapter in safetensors, or its base is not there.
    """
    with wiring.adapter_folder(source) as folder:
        base_model = base or check_adapter(folder).base_model
        if base_model is None:
            raise ModelError(
                "adapter_config.json names no base_model_name_or_path.",
                where=source,
                hint="Say it: --base MODEL",
            )
        lineage = Lineage(base_identity(base_model), origin=f"registered from {source}")
        return registry_of(cluster).register(name, folder, lineage)


def pull(ref: str, directory: str | Path, *, cluster: str | None = None) -> AdapterVersion:
    """Copies a version into a new directory, checked against its hashes."""
    return registry_of(cluster).pull(ref, directory)


def delete(ref: str, *, cluster: str | None = None) -> None:
    """Deletes a version that no alias and no endpoint holds."""
    registry_of(cluster).delete(ref)


def evaluate(
    ref: str,
    data: str,
    *,
    type: str = "chat",
    metrics: Sequence[str] = (),
    max_rows: int | None = None,
    max_new_tokens: int = 64,
    cluster: str | None = None,
) -> dict[str, float]:
    """Measures a version on data, in this process: its metrics, and the bare base's as `base.NAME`."""
    _check_measured(type, metrics)
    version = registry_of(cluster).get(ref)
    dataset = {"path": data, "type": type}
    measured: dict[str, Any] = {
        "datasets": [dataset],
        "metrics": list(metrics),
        "max_new_tokens": max_new_tokens,
    }
    if max_rows is not None:
        measured["max_rows"] = max_rows
    spec = load_job_mapping(
        {
            "name": version.name,
            "model": {
                "base_model": version.lineage.base.source,
                "revision": version.lineage.base.revision or "main",
            },
            "data": {"datasets": [dataset], "val_set_size": 0},
            "eval": measured,
        },
        source="raypeft eval",
    ).spec
    with wiring.adapter_folder(version.url) as folder:
        return wiring.evaluate(spec, str(folder))


def _check_measured(type: str, metrics: Sequence[str]) -> None:
    """Raises SpecError in the words of `raypeft eval`, which has no job whose keys could be named."""
    if type not in TASKS:
        near = closest(type, TASKS)
        hint = f"Closest: '{near[0]}'." if near else None
        raise SpecError(f"'{type}' is none of {', '.join(TASKS)}.", where="--type", hint=hint)
    for name in metrics:
        if name not in TASKS[type].metrics:
            raise SpecError(
                f"'{name}' is not measured of rows of type '{type}'.",
                where="--metric",
                hint=f"Of those: {', '.join(TASKS[type].metrics)}.",
            )
