"""What each tenant has used, in the registry's storage: replicas add to it, and a budget is held against it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from . import objects, stored
from .errors import StorageError
from .keys import KeyBook, Period
from .objects import NotFound, join

_MAX_TRIES = 100


@dataclass(frozen=True)
class Used:
    """Requests and tokens of one tenant, by what they count for: a day, a month, or `total`."""

    tokens: dict[str, int] = field(default_factory=dict)
    requests: dict[str, int] = field(default_factory=dict)

    def tokens_in(self, period: Period, now: float) -> int:
        """Tokens of the day or month that `now` (Unix seconds) falls in, or in all."""
        return self.tokens.get(_names(now)[period], 0)


class Spending:
    """The books of one registry.

    Args:
        registry_url: the registry's root.
    """

    def __init__(self, registry_url: str) -> None:
        self._url = join(registry_url, "spending")
        self._keys = KeyBook(registry_url).url

    def read(self, tenant: str) -> Used:
        """What a tenant has used so far.

        Raises:
            StorageError: it cannot be read.
        """
        return self._read(tenant)[0]

    def add(self, tenant: str, tokens: int, requests: int, now: float | None = None) -> Used:
        """Adds to a tenant's books; any number of processes may at once. Returns what they say then.

        Raises:
            StorageError: it cannot be written; nothing was added.
        """
        names = _names(time.time() if now is None else now)
        url = self._tenant_url(tenant)
        for _ in objects.turns(url, _MAX_TRIES):
            used, etag = self._read(tenant)
            new = Used(_added(used.tokens, names, tokens), _added(used.requests, names, requests))
            document = {"tokens": new.tokens, "requests": new.requests}
            if objects.replace_if(url, etag, stored.dump(document)):
                break
        return new

    def _tenant_url(self, tenant: str) -> str:
        return join(self._url, f"{tenant}.json")

    def _read(self, tenant: str) -> tuple[Used, str | None]:
        url = self._tenant_url(tenant)
        try:
            data, etag = objects.read(url)
        except NotFound:
            if not objects.exists(self._keys):  # whoever spends has a key: it is the storage that is away
                raise StorageError(
                    "there is neither what was spent nor who has a key.",
                    where=url,
                    hint="If the registry's storage is mounted, see that it is.",
                ) from None
            return Used(), None
        document: dict[str, Any] = stored.load(data, url)
        return Used(document.get("tokens", {}), document.get("requests", {})), etag


def falls_in(period: Period, then: float, now: float) -> bool:
    """Whether `then` belongs to the day or month of `now`, both Unix seconds."""
    return _names(then)[period] == _names(now)[period]


def next_period(period: Period, now: float) -> float | None:
    """Unix seconds at which a budget begins anew; None for one that is for good."""
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "total":
        return None
    if period == "day":
        return today.timestamp() + 86400
    first = today.replace(day=1)
    following = (
        first.replace(year=first.year + 1, month=1)
        if first.month == 12
        else first.replace(month=first.month + 1)
    )
    return following.timestamp()


def _names(now: float) -> dict[str, str]:
    today = datetime.fromtimestamp(now, UTC)
    return {"day": today.strftime("%Y-%m-%d"), "month": today.strftime("%Y-%m"), "total": "total"}


def _added(before: dict[str, int], names: dict[str, str], amount: int) -> dict[str, int]:
    """Earlier days and months fall out, but for the last ones, which a report may still ask for."""
    after = {**before, **{name: before.get(name, 0) + amount for name in names.values()}}
    days = sorted(name for name in after if len(name) == 10)[:-31]
    months = sorted(name for name in after if len(name) == 7)[:-24]
    return {name: count for name, count in after.items() if name not in {*days, *months}}
