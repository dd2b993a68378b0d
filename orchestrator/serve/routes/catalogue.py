"""Which model a request's `model` names right now, and having it loaded: what the endpoint shall serve comes from the
registry, is looked at every second, and is known here when a request comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator.errors import RaypeftError, closest
from orchestrator.identity import BaseIdentity
from orchestrator.registry import DEFAULT_ALIAS, AdapterVersion

from ..api_error import ApiError, no_such_model
from ..desired import Desired, Served
from ..engines.engine import Engine
from ..engines.ensemble import ensemble_name, parse_ensemble
from ..engines.residency import Residency
from ..naming import base_id
from ..rollout import Rollout
from ..rollouts.sticky import Sticky
from .replies import model_card

_log = logging.getLogger("ray.serve")

ANYONE = Sticky()
"""A request that nothing tells apart from others."""
_EVERY_S = 1.0
_BOOKS_AT_ONCE = 32
"""Names whose aliases are read again in one look; the others' turn comes."""
_LOADS_AT_ONCE = 8
_TRIES = 3
"""A version that could not be brought here so often counts as one that cannot be served."""
_LONGEST_PAUSE_S = 30.0


class AdapterSource(Protocol):
    """What the catalogue asks of a registry."""

    def get(self, ref: str) -> AdapterVersion:
        """The version of `name@version`."""

    def aliases(self, name: str) -> dict[str, int] | None:
        """Alias -> version; None where the storage has nothing of the name."""

    def aliases_mark(self, name: str) -> tuple[int, int] | None:
        """What changes with a name's aliases, where that is cheap to know."""

    def set_alias(self, name: str, version: int, alias: str) -> Any:
        """Points an alias at a version."""

    def pull(self, ref: str, directory: Any) -> Any:
        """Copies a version's files into a directory."""


class Companion(Protocol):
    """What goes on beside a catalogue, once after each of its looks."""

    async def looked(self) -> None:
        """The catalogue has looked at the registry and done what follows from it."""

    async def ended(self) -> None:
        """The catalogue looks no more."""


@dataclass(frozen=True)
class Target:
    """What answers a request: an adapter version, several as one, or the bare base where `adapter` is None."""

    name: str
    """`name@version`, `name@version:weight+...`, or the base's own name."""
    adapter: str | None
    """The engine's key: the version's content hash, or an ensemble's."""
    shadow: str | None = None
    """The key of a candidate that answers the same prompts beside it, for comparison; for `Generation.shadow`."""


@dataclass
class _Book:
    """The aliases of one name, as they were last read."""

    aliases: dict[str, int]
    mark: tuple[int, int] | None
    read_at: float


@dataclass
class _Failure:
    """A version that could not be brought here."""

    why: str
    times: int = 0
    again_at: float = 0.0
    """By the monotonic clock."""


class Catalogue:
    """The models of one endpoint.

    Args:
        read_desired: reads the endpoint's desired state; None where it has been taken away.
        finish_promotion: tells the storage that a version's waiting alias was set.
        cache: a directory of this replica for the adapters' files.
        max_age_s: how old may be what is known when a request comes; beyond it, the request waits for a new look.
        every_s: seconds between two looks that no request asks for; None: there are none.
        slots: adapters loaded at once; None for as many as there are.
        companion: told after each look.
    """

    def __init__(
        self,
        base: BaseIdentity,
        engine: Engine,
        registry: AdapterSource,
        read_desired: Callable[[], Desired | None],
        finish_promotion: Callable[[Served], None],
        cache: Path,
        max_age_s: float = 3.0,
        every_s: float | None = _EVERY_S,
        slots: int | None = None,
        companion: Companion | None = None,
    ) -> None:
        self.base, self.base_name = base, base_id(base)
        self.residency = Residency(engine, registry, cache, slots)
        self._registry = registry
        self._read_desired, self._finish_promotion = read_desired, finish_promotion
        self._max_age_s, self._every_s = max_age_s, every_s
        self._desired: Desired | None = None
        self._served: dict[str, Served] = {}
        self._names: set[str] = set()
        self._read_at = float("-inf")
        self._books: dict[str, _Book] = {}
        self._versions: dict[str, AdapterVersion] = {}
        self._failures: dict[str, _Failure] = {}
        self._companion = companion
        self._refreshing = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None
        self._started = int(time.time())

    # following the registry

    async def start(self) -> None:
        """Loads all that the endpoint shall serve, and follows it from now on; one that does not load is logged,
        the others serve."""
        await self.look()
        if self._every_s is not None:
            self._following = asyncio.ensure_future(self._follow(self._every_s))

    async def stop(self) -> None:
        """Ends what `start` began."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
            self._following = None
        await self.residency.close()
        if self._companion is not None:
            await self._companion.ended()

    async def look(self) -> None:
        """Reads what the endpoint shall serve, loads what is new, frees what is gone, and lets versions that waited
        take their aliases."""
        await self.refresh(max_age_s=0)
        await self._bring_up(list(self._served.values()))
        await self._free_others()
        if self._companion is not None:
            await self._companion.looked()

    async def _follow(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.look()
            except Exception as error:  # whatever it is, the next look is due
                _log.warning("following the registry: %r", error)

    async def refresh(self, max_age_s: float | None = None) -> None:
        """Reads the desired state and aliases again where they are older than `max_age_s`.

        A storage that does not answer leaves the last known state in force.
        """
        age = self._max_age_s if max_age_s is None else max_age_s
        if time.monotonic() - self._read_at < age:
            return
        async with self._refreshing:
            if time.monotonic() - self._read_at < age:
                return
            try:
                desired = await asyncio.to_thread(self._read_desired)
                names = {entry.name for entry in desired.adapters} if desired else set()
                old = [name for name in names if self._is_old(name)]
                oldest = sorted(
                    old, key=lambda name: self._books[name].read_at if name in self._books else 0.0
                )
                read = await asyncio.to_thread(self._read_books, oldest[:_BOOKS_AT_ONCE])
            except (RaypeftError, OSError) as error:
                _log.warning("desired state not read, the last one stays in force: %s", error)
                self._read_at = time.monotonic()
                return
            # Replaced as a whole, without a pause: whoever asks sees the one or the other.
            self._desired, self._names = desired, names
            self._served = {entry.ref: entry for entry in desired.adapters} if desired else {}
            self._books = {name: book for name, book in (self._books | read).items() if name in names}
            self._read_at = time.monotonic()

    def _read_books(self, names: Iterable[str]) -> dict[str, _Book]:
        found = {}
        for name in names:
            mark = self._registry.aliases_mark(name)  # first: what changes meanwhile is read again
            aliases = self._registry.aliases(name)
            if aliases is None:  # whatever is deployed has some: the storage is away
                aliases = self._books[name].aliases if name in self._books else {}
            found[name] = _Book(aliases, mark, time.monotonic())
        return found

    # requests

    @asynccontextmanager
    async def acquire(
        self, model: str, sticky: Sticky = ANYONE, may_know: Callable[[str], bool] = lambda name: True
    ) -> AsyncIterator[Target]:
        """The target of a request's `model`, loaded and kept loaded within the context: it was decided when the
        request came, and stays what it is whatever happens meanwhile.

        Args:
            sticky: what tells the request apart, where a rollout shares an alias out.
            may_know: whether an error may tell whoever asks of a model.

        Raises:
            ApiError: 404 where nothing here has that name, 400 where the version cannot be served.
        """
        if model in (self.base_name, self.base.name):
            yield Target(self.base_name, None)
            return
        await self.refresh()
        parts = parse_ensemble(model)
        if parts is None:
            entry, rollout = await self._entry(model, sticky, may_know)
            version = await self._version(entry.ref)
            async with self.residency.held(version) as key:
                if entry.alias_when_live:
                    await self._promote(entry)
                yield Target(entry.ref, key, self._shadow(entry, rollout, sticky))
            return
        versions = []
        for name, weight in parts:
            if name in (self.base_name, self.base.name):
                raise ApiError(
                    f"'{name}' is the base itself, and an ensemble names adapters, whose changes are added to it.",
                    param="model",
                    code="invalid_value",
                )
            entry, _ = await self._entry(name, sticky, may_know)
            versions.append((await self._version(entry.ref), weight))
        async with self.residency.held_sum(versions) as key:
            yield Target(ensemble_name([(version.ref, weight) for version, weight in versions]), key)

    async def cards(self) -> list[dict[str, Any]]:
        """The rows of /v1/models, from what is known here: the base, each version, and the aliases that name one of
        them."""
        await self.refresh()
        rows, loaded = [model_card(self.base_name, created=self._started)], self.residency.loaded()
        for entry in list(self._served.values()):
            version = self._versions.get(entry.ref) or await self._version_or_none(entry)
            if version is None:
                continue
            key = version.content_hash
            facts: dict[str, Any] = {
                "created": int(version.created),
                "parent": self.base_name,
                "version": entry.version,
                "method": self.residency.methods.get(key) or None,
            }
            rows.append(model_card(entry.ref, **facts, state=self._state(entry, key, loaded)))
            aliases = self._books[entry.name].aliases if entry.name in self._books else {}
            names = [alias for alias, number in sorted(aliases.items()) if number == entry.version]
            shown = [f"{entry.name}@{alias}" for alias in names]
            shown += [entry.name] if DEFAULT_ALIAS in names else []
            rows += [model_card(name, **facts, root=entry.ref) for name in shown]
        return rows

    def states(self) -> dict[str, str]:
        """`name@version` -> loaded | loading | cold | refused | absent."""
        known, loaded = self._known(), self.residency.loaded()
        return {
            ref: self.residency.state(known[ref].content_hash, loaded) if ref in known else "absent"
            for ref in self._served
        }

    def held(self) -> list[str]:
        """What a request's `model` may say and is loaded here, or will be in a moment: the base's names, versions, and
        aliases of them."""
        refs = {ref for ref, state in self.states().items() if state in ("loaded", "loading")}
        names = {self.base_name, self.base.name, *refs}
        for name, book in list(self._books.items()):
            for alias, number in book.aliases.items():
                if f"{name}@{number}" in refs:
                    names |= {f"{name}@{alias}", name} if alias == DEFAULT_ALIAS else {f"{name}@{alias}"}
        return sorted(names)

    def refused(self) -> dict[str, str]:
        """`name@version` -> why it cannot be served."""
        found = {ref: each.why for ref, each in self._failures.items() if each.times >= _TRIES}
        for ref, version in self._known().items():
            if version.content_hash in self.residency.refused:
                found[ref] = self.residency.refused[version.content_hash]
        return found

    def rollouts(self) -> dict[str, tuple[str, str | None]]:
        """The ids of rollouts -> keys of the candidate and of the version that the alias names."""
        found = {}
        known = self._known()
        for rollout in self._desired.rollouts if self._desired else ():
            if rollout.ref not in known:
                continue
            stable = known.get(f"{rollout.name}@{self._alias(rollout.name, rollout.alias)}")
            found[rollout.id] = (known[rollout.ref].content_hash, stable.content_hash if stable else None)
        return found

    def names(self) -> dict[str, str]:
        """Keys -> `name@version`, of all that is served."""
        return {version.content_hash: ref for ref, version in self._known().items()}

    # inside

    def _known(self) -> dict[str, AdapterVersion]:
        return {ref: self._versions[ref] for ref in self._served if ref in self._versions}

    def _state(self, entry: Served, key: str, loaded: frozenset[str]) -> str:
        rolling = self._desired.rollouts if self._desired else ()
        if any(each.ref == entry.ref and each.state == "baking" for each in rolling):
            return "canary"
        return self.residency.state(key, loaded)

    def _alias(self, name: str, alias: str) -> int | None:
        return self._books[name].aliases.get(alias) if name in self._books else None

    async def _entry(
        self, model: str, sticky: Sticky, may_know: Callable[[str], bool]
    ) -> tuple[Served, Rollout | None]:
        name, _, selector = model.partition("@")
        for is_second in (False, True):  # what is not known here may have come this instant
            if is_second:
                await self.refresh(max_age_s=min(self._max_age_s, 0.2))
            number, rollout = await self._number(name, selector or DEFAULT_ALIAS, sticky)
            if number is not None and (entry := self._served.get(f"{name}@{number}")) is not None:
                return entry, rollout
        raise await self._not_found(model, name, number, may_know)

    async def _number(self, name: str, selector: str, sticky: Sticky) -> tuple[int | None, Rollout | None]:
        if selector.isascii() and selector.isdigit():
            return int(selector), None
        if name not in self._names:
            return None, None
        if self._is_old(name):
            with contextlib.suppress(RaypeftError, OSError):  # else the last one known stays in force
                self._books |= await asyncio.to_thread(self._read_books, [name])
        rollout = self._desired.rollout(name, selector) if self._desired else None
        if rollout is not None and self._answers(rollout, sticky):
            return rollout.candidate, rollout
        return self._alias(name, selector), rollout

    def _is_old(self, name: str) -> bool:
        """Whether the aliases of a name may be others by now: on a disk, a look tells; else their age."""
        book = self._books.get(name)
        if book is None:
            return True
        mark = self._registry.aliases_mark(name)
        return mark != book.mark if mark is not None else time.monotonic() - book.read_at > self._max_age_s

    def _answers(self, rollout: Rollout, sticky: Sticky) -> bool:
        """Whether the candidate answers here. A replica that cannot serve it leaves its requests to the other."""
        if rollout.state not in ("baking", "promoting") or rollout.ref in self.refused():
            return False
        return rollout.answers(sticky.value(rollout.sticky_key))

    def _shadow(self, entry: Served, rollout: Rollout | None, sticky: Sticky) -> str | None:
        if rollout is None or entry.ref == rollout.ref or not rollout.shadow_percent:
            return None
        candidate = self._known().get(rollout.ref)
        if candidate is None or not self.residency.has(candidate.content_hash):
            return None
        return candidate.content_hash if rollout.shadows(sticky.value(rollout.sticky_key)) else None

    async def _not_found(
        self, model: str, name: str, number: int | None, may_know: Callable[[str], bool]
    ) -> ApiError:
        there = [card["id"] for card in await self.cards() if may_know(card["id"])]
        served = name in self._names
        if served and number is not None and "@" + str(number) not in model:
            why = f"names version {number}, which is not deployed here"
        elif served and "@" not in model:
            why = f"has no version with the alias '{DEFAULT_ALIAS}'"
        else:
            near = closest(model, there)
            why = "does not exist" + (f" (closest: '{near[0]}')" if near else "")
        return no_such_model(model, why, there)

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

    async def _version_or_none(self, entry: Served) -> AdapterVersion | None:
        """Of one that came this instant; None where it cannot be read."""
        if entry.ref in self._failures:
            return None
        try:
            return await self._version(entry.ref)
        except (ApiError, RaypeftError, OSError):
            return None

    async def _promote(self, entry: Served) -> None:
        """Sets the alias of a version that had to wait for its replica."""
        if entry.alias_when_live is None:
            return
        await asyncio.to_thread(self._registry.set_alias, entry.name, entry.version, entry.alias_when_live)
        await asyncio.to_thread(self._finish_promotion, entry)
        self._read_at = float("-inf")

    async def _bring_up(self, entries: list[Served]) -> None:
        """Loads what there is room for; the newest first, so that what is rolled out is there."""
        enough = asyncio.Semaphore(_LOADS_AT_ONCE)

        async def bring(entry: Served) -> None:
            async with enough:
                await self._bring(entry)

        waiting = [entry for entry in reversed(entries) if self._lacks(entry)]
        await asyncio.gather(*map(bring, waiting))

    def _lacks(self, entry: Served) -> bool:
        failure = self._failures.get(entry.ref)
        if failure is not None and time.monotonic() < failure.again_at:
            return False
        if entry.alias_when_live or entry.ref not in self._versions:
            return True
        state = self.residency.state(self._versions[entry.ref].content_hash)
        return state == "absent" or (state == "cold" and self.residency.has_room())

    async def _bring(self, entry: Served) -> None:
        try:
            version = await self._version(entry.ref)
            await self.residency.bring(version)
            if self.residency.has(version.content_hash):
                await self._promote(entry)
        except (ApiError, RaypeftError, OSError) as error:
            failure = self._failures.setdefault(entry.ref, _Failure(""))
            if str(error) != failure.why:
                _log.error("%s is not served: %s", entry.ref, error)
            failure.why, failure.times = str(error), failure.times + 1
            failure.again_at = time.monotonic() + min(2.0**failure.times, _LONGEST_PAUSE_S)
        else:
            self._failures.pop(entry.ref, None)

    async def _free_others(self) -> None:
        self._versions = self._known()
        self._failures = {ref: each for ref, each in self._failures.items() if ref in self._served}
        await self.residency.keep_only(version.content_hash for version in self._versions.values())
