"""Tenants of the endpoints: their keys, limits and use."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .. import wiring
from ..cluster import load_cluster
from ..keys import PERIODS, KeyBook, KeyRow, NewKey
from ..serve.rollouts.askable import check_askable
from ..spending import Spending
from .found import registry_of


def create_key(
    tenant: str,
    limits: Mapping[str, Any] | None = None,
    *,
    expires_s: float | None = None,
    force: bool = False,
    cluster: str | None = None,
) -> NewKey:
    """Makes a key for a tenant of the registry's endpoints; its `secret` is seen this once.

    Args:
        limits: fields of `keys.Limits` to change for the tenant, all its keys included.
        expires_s: seconds after which it opens nothing.
        force: take models of the limits that are not there yet.

    Raises:
        RegistryError: the name cannot be a tenant's, or nothing is called like one of the models.
    """
    wiring.check_registry(load_cluster(cluster))
    registry = registry_of(cluster)
    if models := (limits or {}).get("models"):
        check_askable(registry, models, force=force)
    return KeyBook(registry.url).create(tenant, dict(limits or {}), expires_s=expires_s)


def keys(*, cluster: str | None = None) -> list[KeyRow]:
    """Every key, the oldest first, with its tenant's limits."""
    return KeyBook(registry_of(cluster).url).rows()


def revoke_key(name: str, *, cluster: str | None = None) -> list[str]:
    """Ends a key (by its id), or all keys of a tenant; returns their ids."""
    return KeyBook(registry_of(cluster).url).revoke(name)


def used(tenant: str, *, cluster: str | None = None) -> dict[str, int]:
    """Tokens that a tenant has used today, this month and in all."""
    used = Spending(registry_of(cluster).url).read(tenant)
    return {period: used.tokens_in(period, time.time()) for period in PERIODS}
