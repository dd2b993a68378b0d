"""Which adapters the engine holds: each is loaded once whoever asks, counted while it is used, and leaves only at
rest. Files that were pulled stay on disk, so that what comes back does not come from the storage."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import shutil
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from orchestrator.adapter_folder import CONFIG
from orchestrator.registry import AdapterVersion

from ..api_error import ApiError
from .engine import AdapterRefused, Engine

_log = logging.getLogger("ray.serve")

_PULLS_AT_ONCE = 4
_SECONDS_FOR_A_SLOT = 60.0
_MOST_SUMS = 32
"""Ensembles that stay when nobody asks for them."""


class Files(Protocol):
    """Where adapters' files come from."""

    def pull(self, ref: str, directory: Any) -> Any:
        """Copies a version's files into a directory, whole or not at all."""


class Residency:
    """The adapters of one engine, by their content hashes. All methods belong to one event loop.

    Args:
        cache: a directory of this replica: the cold tier.
        slots: adapters that the engine may hold at once; None for as many as there are.
        patience_s: how long a request waits for a slot while all are in use.
    """

    def __init__(
        self,
        engine: Engine,
        files: Files,
        cache: Path,
        slots: int | None = None,
        patience_s: float = _SECONDS_FOR_A_SLOT,
    ) -> None:
        self._engine, self._files, self._cache = engine, files, cache
        self._slots, self._patience_s = slots, patience_s
        self._uses: Counter[str] = Counter()
        self._in_slots: OrderedDict[str, None] = OrderedDict()
        """What has a slot, the longest unused first; also while it is being loaded."""
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._pulls: dict[str, asyncio.Task[Path]] = {}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._sums: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._making_room, self._pulling = asyncio.Lock(), asyncio.Semaphore(_PULLS_AT_ONCE)
        self._rested = asyncio.Event()
        self.refused: dict[str, str] = {}
        """Key -> why the engine does not take it. Files never change, so it is not tried again."""
        self.methods: dict[str, str] = {}
        """Key -> its method, as its config names it."""

    # what is there

    def has(self, key: str) -> bool:
        """Whether a key answers now, without loading anything."""
        return key in self._engine.loaded() and key not in self._leaving

    def loaded(self) -> frozenset[str]:
        """All keys that answer now."""
        return self._engine.loaded() - self._leaving.keys()

    def state(self, key: str, loaded: frozenset[str] | None = None) -> str:
        """loaded | loading | cold (its files are here) | refused | absent.

        Args:
            loaded: what `loaded` gave, where many are asked about.
        """
        if self.has(key) if loaded is None else key in loaded:
            return "loaded"
        if key in self.refused:
            return "refused"
        if key in self._loads or key in self._pulls:
            return "loading"
        return "cold" if (self._cache / key).exists() else "absent"

    def has_room(self) -> bool:
        """Whether another adapter could be loaded without one that leaves."""
        return self._slots is None or len(self._in_slots) < self._slots

    # use

    @contextmanager
    def pinned(self, key: str) -> Any:
        """Within it, nothing unloads a key that is loaded."""
        self._uses[key] += 1
        try:
            yield
        finally:
            self._unpin(key)

    @asynccontextmanager
    async def held(self, version: AdapterVersion) -> AsyncIterator[str]:
        """Within it, the version is loaded and nothing unloads it; gives its key.

        Raises:
            ApiError: 400 where the engine refuses it, 503 where no slot came free.
            RaypeftError: the storage does not give its files.
        """
        key = version.content_hash
        with self.pinned(key):
            while not self.has(key):
                await self._load(version)
            if key in self._in_slots:
                self._in_slots.move_to_end(key)
            yield key

    @asynccontextmanager
    async def held_sum(self, parts: Sequence[tuple[AdapterVersion, float]]) -> AsyncIterator[str]:
        """Within it, the weighted sum of some versions answers; gives its key.

        Raises:
            ApiError: 400 where they have no sum, or are more than there are slots; else as `held`.
        """
        if self._slots is not None and len({version.content_hash for version, _ in parts}) > self._slots:
            raise ApiError(
                f"An ensemble of {len(parts)} adapters does not fit: {self._slots} can be loaded at once.",
                param="model",
            )
        async with AsyncExitStack() as stack:
            keys = [await stack.enter_async_context(self.held(version)) for version, _ in parts]
            weighted = [(key, weight) for key, (_, weight) in zip(keys, parts, strict=True)]
            key = sum_key(weighted)
            stack.enter_context(self.pinned(key))
            if key in self._leaving:
                await asyncio.shield(self._leaving[key])
            if not self.has(key):
                names = {version.content_hash: version.ref for version, _ in parts}
                await self._once(self._loads, key, self._combine(key, weighted, names))
            self._sums[key] = tuple(dict.fromkeys(keys))
            self._sums.move_to_end(key)
            yield key

    # following what is desired

    async def bring(self, version: AdapterVersion) -> None:
        """Loads a version where there is room, else has its files on disk."""
        if self.has_room() or self.has(version.content_hash):
            async with self.held(version):
                return
        await self._pulled(version)

    async def keep_only(self, keys: Iterable[str]) -> None:
        """Frees what is not among `keys` and at rest, on disk too. What is in use leaves at a later call."""
        kept = set(keys)
        for key in [key for key, parts in self._sums.items() if not kept.issuperset(parts)]:
            await self._free(key)
        gone = [key for key in self._engine.loaded() if key not in kept and key not in self._sums]
        for key in gone:
            await self._free(key)
        for folder in [path for path in self._cache.glob("*") if path.name not in kept]:
            if folder.name.startswith("."):
                continue  # on its way in
            if not self._uses[folder.name] and folder.name not in self._pulls:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        for told in (self.refused, self.methods):
            for key in [key for key in told if key not in kept]:
                del told[key]
        while len(self._sums) > _MOST_SUMS and (spare := self._at_rest(self._sums)) is not None:
            await self._free(spare)

    async def close(self) -> None:
        """Ends loads that nobody waits for any more."""
        tasks = [*self._loads.values(), *self._pulls.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # inside

    def _unpin(self, key: str) -> None:
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._uses[key]
            self._rested.set()

    async def _load(self, version: AdapterVersion) -> None:
        key = version.content_hash
        if key in self._leaving:
            await asyncio.shield(self._leaving[key])
        if key in self.refused:
            raise _refused(version.ref, self.refused[key])
        await self._once(self._loads, key, self._bring_in(version))

    async def _once(self, running: dict[str, Any], key: str, work: Any) -> Any:
        """One task a key, however many wait for it; a client that leaves ends it for none of them."""
        if key in running:
            work.close()
        else:
            running[key] = asyncio.ensure_future(work)
            running[key].add_done_callback(lambda task: _forget(running, key, task))
        return await asyncio.shield(running[key])

    async def _bring_in(self, version: AdapterVersion) -> None:
        key = version.content_hash
        directory = await self._pulled(version)
        await self._take_slot(key)
        try:
            await self._engine.load(key, directory)
        except AdapterRefused as error:
            self.refused[key] = _said(error, {key: version.ref})
            raise _refused(version.ref, self.refused[key]) from error
        finally:
            if key not in self._engine.loaded():
                self._in_slots.pop(key, None)
                self._rested.set()

    async def _combine(self, key: str, parts: Sequence[tuple[str, float]], names: Mapping[str, str]) -> None:
        try:
            await self._engine.combine(key, parts)
        except AdapterRefused as error:
            raise ApiError(
                f"These adapters cannot answer together: {_said(error, names)}",
                param="model",
                code="adapter_refused",
            ) from error

    async def _pulled(self, version: AdapterVersion) -> Path:
        directory = self._cache / version.content_hash
        if directory.exists():
            return directory
        return await self._once(self._pulls, version.content_hash, self._pull(version, directory))

    async def _pull(self, version: AdapterVersion, directory: Path) -> Path:
        async with self._pulling:
            await asyncio.to_thread(self._files.pull, version.ref, directory)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            config = json.loads((directory / CONFIG).read_bytes())
            self.methods[version.content_hash] = str(config.get("peft_type", "")).lower()
        return directory

    async def _take_slot(self, key: str) -> None:
        """Waits until a slot is free; of those at rest, the longest unused leaves."""
        async with self._making_room:
            deadline = asyncio.get_running_loop().time() + self._patience_s
            while not self.has_room():
                self._rested.clear()
                if (spare := self._at_rest(self._in_slots)) is not None or (
                    spare := self._at_rest(self._sums)
                ) is not None:
                    await self._free(spare)
                    continue
                left = deadline - asyncio.get_running_loop().time()
                try:
                    await asyncio.wait_for(self._rested.wait(), left)
                except TimeoutError:
                    raise ApiError(
                        f"All {self._slots} adapters that can be loaded at once are in use. Try again.",
                        status=503,
                        code="no_slot",
                        retry_after_s=5,
                    ) from None
            self._in_slots[key] = None

    def _at_rest(self, keys: Iterable[str]) -> str | None:
        """The longest unused of them, that no request and no ensemble uses."""
        needed = {part for parts in self._sums.values() for part in parts}
        return next(
            (key for key in keys if not self._uses[key] and key not in needed and key not in self._loads),
            None,
        )

    async def _free(self, key: str) -> None:
        """Unloads a key that is at rest; one that is in use, on its way in, or part of an ensemble, stays."""
        if self._uses[key] or key in self._loads or any(key in parts for parts in self._sums.values()):
            return
        if key not in self._leaving:
            self._leaving[key] = asyncio.ensure_future(self._engine.unload(key))
        try:
            await asyncio.shield(self._leaving[key])
        finally:
            self._leaving.pop(key, None)
            self._in_slots.pop(key, None)
            self._sums.pop(key, None)
            self._rested.set()


def sum_key(parts: Sequence[tuple[str, float]]) -> str:
    """The engine's key of a weighted sum: the same for the same parts in the same order."""
    text = "+".join(f"{key}:{weight!r}" for key, weight in parts)
    return "sum-" + hashlib.sha256(text.encode()).hexdigest()


def _forget(running: dict[str, Any], key: str, task: asyncio.Task[Any]) -> None:
    running.pop(key, None)
    if not task.cancelled():
        task.exception()  # seen: whoever waited has been told


def _said(error: AdapterRefused, names: Mapping[str, str]) -> str:
    """Why the engine refuses adapters, whose keys it knows alone, by the names that their users know. Keys in the names
    of tensors stand in none of an adapter's files."""
    said = str(error)
    for key, name in names.items():
        said = said.replace(f"adapter '{key}': ", "").replace(f".{key}.", ".").replace(key, name)
    return said


def _refused(ref: str, why: str) -> ApiError:
    return ApiError(f"The model '{ref}' does not load: {why}", param="model", code="adapter_refused")
