"""Which model a request's `model` names right now, and having it loaded: desired state from the registry,
aliases looked up per request, versions counted while a request uses them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import RaypeftError, closest
from ..identity import BaseIdentity
from ..registry import DEFAULT_ALIAS, AdapterVersion
from .api_error import ApiError
from .desired import Desired, Served
from .engine import AdapterRefused, Engine
from .naming import base_id
from .replies import model_card
from .sticky import Sticky

_log = logging.getLogger("ray.serve")

ANYONE = Sticky()
"""A request that nothing tells apart from others."""


class AdapterSource(Protocol):
    """What the catalogue asks of a registry."""

    def get(self, ref: str) -> AdapterVersion:
        """The version of `name@version`."""

    def alias(self, name: str, alias: str) -> int | None:
        """The version that an alias names."""

    def set_alias(self, name: str, version: int, alias: str) -> Any:
        """Points an alias at a version."""

    def pull(self, ref: str, directory: Any) -> Any:
        """Copies a version's files into a directory."""


@dataclass(frozen=True)
class Target:
    """What answers a request: an adapter version, or the bare base where `adapter` is None."""

    name: str
    """`name@version`, or the base's own name."""
    adapter: str | None
    """The engine's key: the version's content hash, or an ensemble's."""
    shadow: str | None = None
    """The key of a candidate that answers the same prompts beside it, for comparison; for `Generation.shadow`."""


class Catalogue:
    """The models of one endpoint.

    Args:
        read_desired: reads the endpoint's desired state; None where it has been taken away.
        finish_promotion: tells the storage that a version's waiting alias was set.
        cache: a directory of this replica for the adapters' files.
        max_age_s: how old the desired state may be when a request comes.
    """

    def __init__(
        self,
        base: BaseIdentity,
        engine: Engine,
        registry: AdapterSource,
        read_desired: Callable[[], Desired | None],
        finish_promotion: Callable[[Served], None],
        cache: Path,
        max_age_s: float = 1.0,
    ) -> None:
        self.base, self.base_name = base, base_id(base)
        self._engine, self._registry, self._cache = engine, registry, cache
        self._read_desired, self._finish_promotion = read_desired, finish_promotion
        self._max_age_s = max_age_s
        self._served: dict[str, Served] = {}
        self._read_at = float("-inf")
        self._versions: dict[str, AdapterVersion] = {}
        self._uses: Counter[str] = Counter()
        self._leaving: set[str] = set()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._refreshing = asyncio.Lock()
        self._started = int(time.time())

    async def start(self) -> None:
        """Loads all that the endpoint shall serve; one that does not load is logged, the others serve."""
        await self.refresh(max_age_s=0)
        await self._bring_up(list(self._served.values()))

    async def stop(self) -> None:
        """Ends what `start` began."""

    async def follow(self) -> None:
        """Reads the desired state, and lets versions that waited take their aliases."""
        await self.refresh()
        await self._bring_up([entry for entry in self._served.values() if entry.alias_when_live])

    async def refresh(self, max_age_s: float | None = None) -> None:
        """Reads the desired state again where it is older than `max_age_s`; frees what is no longer served.

        A storage that does not answer leaves the last known state in force.
        """
        age = self._max_age_s if max_age_s is None else max_age_s
        async with self._refreshing:
            if time.monotonic() - self._read_at < age:
                return
            try:
                desired = await asyncio.to_thread(self._read_desired)
            except (RaypeftError, OSError) as error:
                _log.warning("desired state not read, the last one stays in force: %s", error)
                self._read_at = time.monotonic()
                return
            self._served = {entry.ref: entry for entry in desired.adapters} if desired else {}
            self._read_at = time.monotonic()
        await self._free_others()

    @asynccontextmanager
    async def acquire(self, model: str, sticky: Sticky = ANYONE) -> AsyncIterator[Target]:
        """The target of a request's `model`, loaded and kept loaded within the context.

        Raises:
            ApiError: 404 where nothing here has that name, 400 where the version cannot be served.
        """
        if model in (self.base_name, self.base.name):
            yield Target(self.base_name, None)
            return
        await self.refresh()
        entry = await self._entry(model)
        version = await self._version(entry.ref)
        async with self._held(version):
            if entry.alias_when_live:
                await self._promote(entry)
            yield Target(entry.ref, version.content_hash)

    async def cards(self) -> list[dict[str, Any]]:
        """The rows of /v1/models: the base, each version, and the aliases that name one of them."""
        await self.refresh(max_age_s=0)
        rows = [model_card(self.base_name, created=self._started)]
        for entry in list(self._served.values()):
            try:
                version = await asyncio.to_thread(self._registry.get, entry.ref)
            except (RaypeftError, OSError) as error:
                _log.warning("%s: %s", entry.ref, error)
                continue
            created = int(version.created)
            rows.append(model_card(entry.ref, created=created, parent=self.base_name))
            names = [f"{entry.name}@{alias}" for alias in version.aliases]
            names += [entry.name] if DEFAULT_ALIAS in version.aliases else []
            rows += [
                model_card(name, created=created, parent=self.base_name, root=entry.ref) for name in names
            ]
        return rows

    async def _entry(self, model: str) -> Served:
        name, _, selector = model.partition("@")
        number = await self._number(name, selector or DEFAULT_ALIAS)
        if number is not None:
            ref = f"{name}@{number}"
            if ref not in self._served:
                await self.refresh(max_age_s=0)
            if ref in self._served:
                return self._served[ref]
        raise await self._not_found(model, name, number)

    async def _number(self, name: str, selector: str) -> int | None:
        if selector.isascii() and selector.isdigit():
            return int(selector)
        if not any(entry.name == name for entry in self._served.values()):
            await self.refresh(max_age_s=0)
            if not any(entry.name == name for entry in self._served.values()):
                return None
        try:
            return await asyncio.to_thread(self._registry.alias, name, selector)
        except RaypeftError:
            return None

    async def _not_found(self, model: str, name: str, number: int | None) -> ApiError:
        there = [card["id"] for card in await self.cards()]
        served = any(entry.name == name for entry in self._served.values())
        if served and number is not None and "@" + str(number) not in model:
            why = f"names version {number}, which is not deployed here"
        elif served and "@" not in model:
            why = f"has no version with the alias '{DEFAULT_ALIAS}'"
        else:
            near = closest(model, there)
            why = "does not exist" + (f" (closest: '{near[0]}')" if near else "")
        return ApiError(
            f"The model '{model}' {why}. Here are: {', '.join(there)}.",
            status=404,
            param="model",
            code="model_not_found",
        )

    async def _version(self, ref: str) -> AdapterVersion:
        """The version, whose base has been compared with this one. Versions never change: read once."""
        if ref not in self._versions:
            version = await asyncio.to_thread(self._registry.get, ref)
            theirs = version.lineage.base
            if theirs.content_hash != self.base.content_hash:
                raise ApiError(
                    f"The model '{ref}' was trained on {theirs.name}, another base than {self.base.name}.",
                    param="model",
                    code="base_mismatch",
                )
            self._versions[ref] = version
        return self._versions[ref]

    @asynccontextmanager
    async def _held(self, version: AdapterVersion) -> AsyncIterator[None]:
        """Within it, the version is loaded and nothing unloads it."""
        key = version.content_hash
        self._uses[key] += 1
        try:
            if key in self._leaving or key not in self._engine.loaded():
                async with self._locks[key]:
                    if key not in self._engine.loaded():
                        await self._load(version)
            yield
        finally:
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._uses[key]

    async def _load(self, version: AdapterVersion) -> None:
        directory = self._cache / version.content_hash
        try:
            if not directory.exists():
                await asyncio.to_thread(self._registry.pull, version.ref, directory)
            await self._engine.load(version.content_hash, directory)
        except AdapterRefused as error:
            raise ApiError(
                f"The model '{version.ref}' does not load: {error}", param="model", code="adapter_refused"
            ) from error

    async def _promote(self, entry: Served) -> None:
        """Sets the alias of a version that had to wait for its replica."""
        if entry.alias_when_live is None:
            return
        await asyncio.to_thread(self._registry.set_alias, entry.name, entry.version, entry.alias_when_live)
        await asyncio.to_thread(self._finish_promotion, entry)
        self._read_at = float("-inf")

    async def _bring_up(self, entries: list[Served]) -> None:
        for entry in entries:
            try:
                async with self._held(await self._version(entry.ref)):
                    await self._promote(entry)
            except (ApiError, RaypeftError, OSError) as error:
                _log.error("%s is not served: %s", entry.ref, error)

    async def _free_others(self) -> None:
        keep = {self._versions[ref].content_hash for ref in self._served if ref in self._versions}
        for key in self._engine.loaded() - keep:
            if self._uses[key] or key in self._leaving:
                continue
            self._leaving.add(key)
            try:
                async with self._locks[key]:
                    await self._engine.unload(key)
            finally:
                self._leaving.discard(key)
