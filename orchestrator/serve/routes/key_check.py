"""Who a request comes from: its key, against the registry's keys."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.errors import RaypeftError, ServeError, StorageError
from orchestrator.keys import KeyRing, Limits

from ..api_error import ApiError
from ..engines.ensemble import part_texts

_log = logging.getLogger("ray.serve")

_MAX_AGE_S = 1.0
"""How old the keys may be when a request comes: a revoked one opens nothing after that."""


class Keys(Protocol):
    """Where keys are read."""

    def read(self) -> KeyRing:
        """All keys and tenants."""


@dataclass(frozen=True)
class Tenant:
    """Who asks; `name` is "" where no keys are asked for."""

    name: str = ""
    limits: Limits = field(default_factory=Limits)

    def check_model(self, model: str) -> None:
        """Raises ApiError (403) where the tenant may not ask that model, or a part of an ensemble."""
        if not self.may_use(model):
            raise ApiError(
                f"Your key may not use the model '{model}'.",
                status=403,
                param="model",
                code="model_not_allowed",
            )

    def may_use(self, model: str) -> bool:
        """Whether all adapters that `model` names are among the tenant's."""
        allowed = self.limits.models
        return allowed is None or all(_name(part) in allowed for part in part_texts(model))


def _name(part: str) -> str:
    """`docs` of `docs@3:0.7`."""
    return part.partition("@")[0].partition(":")[0].strip()


class KeyCheck:
    """The keys of a registry as one replica knows them.

    Args:
        keys: where they are kept.
        required: ask for a key although none was ever made: others than this machine's users reach the endpoint.
    """

    def __init__(self, keys: Keys, *, required: bool) -> None:
        self._keys, self._required = keys, required
        self._ring = KeyRing()
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    async def start(self) -> None:
        """Reads the keys.

        Raises:
            RaypeftError: they cannot be read, so nobody could be let in or kept out.
        """
        self._ring = await asyncio.to_thread(self._keys.read)
        self._read_at = time.monotonic()

    async def tenant(self, authorization: str | None) -> Tenant:
        """Whose key a request's Authorization header shows.

        Raises:
            ApiError: 401: none, or one that opens nothing.
        """
        asked_at = time.monotonic()
        await self._refresh(asked_at - _MAX_AGE_S)
        if self._ring.is_empty and not self._required:
            return Tenant()
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise ApiError(
                "You did not provide an API key. Send one in the header 'Authorization: Bearer KEY'.",
                status=401,
            )
        key = self._ring.find(secret.strip())
        if key is None:  # one that was made a moment ago is known to the storage
            await self._refresh(asked_at)
            key = self._ring.find(secret.strip())
        state = key.state(time.time()) if key else "unknown"
        if key is None or state != "active":
            why = {"expired": "has expired", "revoked": "has been revoked"}.get(state, "is not known here")
            raise ApiError(f"Your API key {why}.", status=401, code="invalid_api_key")
        return Tenant(key.tenant, self._ring.limits(key.tenant))

    async def _refresh(self, since: float) -> None:
        """Reads the keys unless they were read after `since`, at most once a second; a storage that does not answer
        leaves those known in force."""
        if self._read_at >= since:
            return  # also while somebody else waits with a key that nobody knows
        async with self._reading:
            if self._read_at >= since:
                return
            if (early := self._read_at + _MAX_AGE_S - time.monotonic()) > 0:
                await asyncio.sleep(early)
            try:
                ring = await asyncio.to_thread(self._keys.read)
                if ring.is_empty and not self._ring.is_empty:  # keys end, and stay: the storage is away
                    raise StorageError("the registry has no keys any more")
                self._ring = ring
            except (RaypeftError, OSError) as error:
                _log.warning("keys not read, those known stay in force: %s", error)
            self._read_at = time.monotonic()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def require_keys(host: str, ring: KeyRing, cluster: str = "") -> None:
    """An endpoint that others reach than this machine's users does not start without keys.

    Raises:
        ServeError: it listens beyond loopback, and no key opens it.
    """
    if is_loopback(host) or ring.has_active(time.time()):
        return
    option = f" --cluster {cluster}" if cluster else ""
    raise ServeError(
        f"endpoints that listen on {host} are reached by others, and this registry has no key that is in force.",
        where="serve.host",
        hint=f"Make one first: raypeft keys create TENANT{option} (or listen on 127.0.0.1).",
    )
