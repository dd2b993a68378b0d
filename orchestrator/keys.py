"""Who may ask an endpoint: tenants, their limits, and their keys, in the registry's storage for all replicas.

A key is shown once. What is stored is its SHA-256: 256 random bits need no salt and no slow hash, and a look-up by
the hash tells nothing by its timing.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from . import objects, stored
from .errors import RegistryError, closest
from .objects import NotFound, join

Period = Literal["day", "month", "total"]
PERIODS: tuple[Period, ...] = ("day", "month", "total")

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_MAX_TRIES = 100
OURS = "raypeft"
"""The tenant of the keys that `raypeft deploy` lends itself; nobody else can have the name."""


@dataclass(frozen=True)
class Limits:
    """What one tenant may use; None: as much as there is."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and answer together."""
    token_budget: int | None = None
    budget_period: Period = "month"
    """What the budget is for: a day, a calendar month (UTC), or for good."""
    max_parallel: int | None = None
    """Answers that may be under way or waiting at once, on each replica."""
    models: tuple[str, ...] | None = None
    """Names of adapters (each with all its versions) and bases."""


@dataclass(frozen=True)
class Key:
    """One key, without what makes it one."""

    id: str
    tenant: str
    sha256: str
    created: float
    """Unix seconds, like the next two."""
    expires: float | None = None
    revoked: float | None = None

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        """Whether it opens anything."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "active"


@dataclass(frozen=True)
class KeyRow:
    """A key as `raypeft keys list` shows it."""

    id: str
    tenant: str
    state: str
    created: float
    expires: float | None
    limits: Limits

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class NewKey:
    """A key that was just made: the only time that `secret` is seen."""

    id: str
    tenant: str
    secret: str
    limits: Limits
    expires: float | None

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"NewKey(id={self.id!r}, tenant={self.tenant!r})"


@dataclass(frozen=True)
class KeyRing:
    """All keys and tenants at one moment."""

    tenants: dict[str, Limits] = field(default_factory=dict)
    keys: tuple[Key, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_hash", {key.sha256: key for key in self.keys})

    @property
    def is_empty(self) -> bool:
        """Whether no key was ever made: then nothing is asked for on loopback."""
        return not self.keys

    def has_active(self, now: float) -> bool:
        """Whether any key that a user made opens anything."""
        return any(key.state(now) == "active" for key in self.keys if key.tenant != OURS)

    def find(self, secret: str) -> Key | None:
        """The key that a client shows, whatever its state."""
        by_hash: dict[str, Key] = getattr(self, "_by_hash")  # noqa: B009 (frozen: set by __post_init__)
        return by_hash.get(_hash(secret))

    def limits(self, tenant: str) -> Limits:
        """What a tenant may use."""
        return self.tenants.get(tenant, Limits())


class KeyBook:
    """The keys of one registry.

    Args:
        registry_url: the registry's root.
    """

    def __init__(self, registry_url: str) -> None:
        self.url = join(registry_url, "keys.json")

    def read(self) -> KeyRing:
        """All keys and tenants; an empty ring where none was ever made."""
        return self._read()[0]

    def create(
        self, tenant: str, limits: dict[str, Any] | None = None, *, expires_s: float | None = None
    ) -> NewKey:
        """One more key of a tenant.

        Args:
            limits: fields of `Limits` to change for the tenant, all its keys included; others stay.
            expires_s: seconds after which it opens nothing; None: it never expires.

        Raises:
            RegistryError: the name cannot be a tenant's.
        """
        if not _TENANT.fullmatch(tenant) or tenant == OURS:
            raise RegistryError(
                f"'{tenant}' cannot be a tenant's name.",
                hint="Use letters, digits, '.', '_' and '-', at most 63, beginning with a letter or digit; not "
                f"'{OURS}'.",
            )
        return self._add(tenant, limits or {}, expires_s)

    def lend(self, seconds: float = 3600) -> str:
        """The secret of a short-lived key for raypeft's own calls."""
        return self._add(OURS, {}, seconds).secret

    def rows(self) -> list[KeyRow]:
        """Every key that a user made, the oldest first."""
        ring, now = self.read(), time.time()
        return [
            KeyRow(key.id, key.tenant, key.state(now), key.created, key.expires, ring.limits(key.tenant))
            for key in ring.keys
            if key.tenant != OURS
        ]

    def revoke(self, name: str) -> list[str]:
        """Ends a key (by its id), or every key of a tenant; returns the ids. Endpoints follow within seconds.

        Raises:
            RegistryError: neither has that name.
        """
        ended: list[str] = []

        def end(ring: KeyRing) -> KeyRing:
            mine = [key for key in ring.keys if key.tenant != OURS]
            found = {key.id for key in mine if name in (key.id, key.tenant)}
            if not found:
                near = closest(name, {key.id for key in mine} | {key.tenant for key in mine})
                hint = f"Closest: '{near[0]}'." if near else "List them: raypeft keys list"
                raise RegistryError(f"there is no key or tenant '{name}'.", hint=hint)
            ended[:] = sorted(found)
            now = time.time()
            keys = (
                replace(key, revoked=now) if key.id in found and key.revoked is None else key
                for key in ring.keys
            )
            return replace(ring, keys=tuple(keys))

        self._change(end)
        return ended

    def _add(self, tenant: str, limits: dict[str, Any], expires_s: float | None) -> NewKey:
        secret = f"rp-{secrets.token_urlsafe(32)}"
        now = time.time()
        expires = None if expires_s is None else now + expires_s
        made: list[NewKey] = []

        def add(ring: KeyRing) -> KeyRing:
            id = secrets.token_hex(4)
            mine = replace(ring.limits(tenant), **limits)
            key = Key(id, tenant, _hash(secret), now, expires)
            made[:] = [NewKey(id, tenant, secret, mine, expires)]
            kept = (each for each in ring.keys if each.tenant != OURS or each.state(now) == "active")
            tenants = ring.tenants if tenant == OURS else {**ring.tenants, tenant: mine}
            return KeyRing(tenants, (*kept, key))

        self._change(add)
        return made[0]

    def _change(self, change: Callable[[KeyRing], KeyRing]) -> None:
        for _ in objects.turns(self.url, _MAX_TRIES):
            ring, etag = self._read()
            if objects.replace_if(self.url, etag, stored.dump(_to_dict(change(ring)))):
                return

    def _read(self) -> tuple[KeyRing, str | None]:
        try:
            data, etag = objects.read(self.url)
        except NotFound:
            return KeyRing(), None
        with stored.reading(self.url):
            return _from_dict(stored.load(data, self.url)), etag


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


def _to_dict(ring: KeyRing) -> dict[str, Any]:
    return {
        "tenants": {name: asdict(limits) for name, limits in ring.tenants.items()},
        "keys": [asdict(key) for key in ring.keys],
    }


def _from_dict(document: dict[str, Any]) -> KeyRing:
    tenants = {name: _limits(each) for name, each in document.get("tenants", {}).items()}
    return KeyRing(tenants, tuple(Key(**stored.known(Key, each)) for each in document.get("keys", ())))


def _limits(document: dict[str, Any]) -> Limits:
    known = stored.known(Limits, document)
    if known.get("models") is not None:
        known["models"] = tuple(known["models"])
    return Limits(**known)
