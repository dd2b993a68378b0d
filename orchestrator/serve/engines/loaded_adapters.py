"""The adapters of an engine: asked for by any thread, put on the base and taken off it in slices between its steps."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.train.rows.task_ids import ARGUMENT
from peft_dist.ahead import looks_ahead
from peft_dist.packed_rows import Blend, Reads
from peft_dist.pauses import pausing
from peft_dist.prompts.packed import num_virtual

from .apart import ApartLane
from .engine import AdapterRefused, EngineDead
from .first_token import at_once, runs_apart
from .packed_base import PackedBase
from .servable import check_blend, check_on_something, num_tasks, put_on, read_servable
from .slices import Slices


@dataclass(eq=False)
class Adapter:
    """A key that was loaded: what serves it, and how many sequences use it."""

    key: str
    choice: str | Blend
    """Its name on the base, or the names and weights of which it is the sum."""
    virtual_tokens: int = 0
    num_tasks: int = 0
    is_apart: bool = False
    """Whether no packed row can hold its sequences beside others'."""
    users: int = 0
    leaving: Future[None] | None = None

    def reads_of(self, task: int | None) -> Reads:
        """What its methods read of a sequence of that task; nothing where it knows of none.

        Raises:
            ValueError: it has tasks, and this is none of them.
        """
        if not self.num_tasks:
            return ()
        if task is None or not 0 <= task < self.num_tasks:
            raise ValueError(
                f"task: {task}; {self.key!r} has {self.num_tasks}, numbered from 0, and needs one."
            )
        return ((ARGUMENT, task),)


class LoadedAdapters:
    """All methods may be called from any thread. An adapter goes when nobody uses it any more.

    Args:
        model: the PeftModel that they are put on.
        base: it, run in packed rows. lane: where those are tried that run apart.
        slices: does what takes a core, while no step runs.
    """

    def __init__(self, model: Any, base: PackedBase, lane: ApartLane, slices: Slices) -> None:
        self._model, self._base, self._lane, self._slices = model, base, lane, slices
        self._known: dict[str, Adapter] = {}
        self._loading: dict[str, Future[None]] = {}
        self._files = ThreadPoolExecutor(1, thread_name_prefix="adapter-files")
        self._read_to = bytearray(2**20)
        self._door = threading.Lock()
        self._ended: BaseException | None = None

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str | None) -> Adapter | None:
        """What is loaded under a key, be it about to leave."""
        return self._known.get(key) if key else None

    def keys(self) -> frozenset[str]:
        """The keys that are loaded."""
        with self._door:
            return frozenset(key for key, adapter in self._known.items() if adapter.leaving is None)

    def use(self, key: str) -> Adapter:
        """Has a key stay until `release`.

        Raises:
            AdapterRefused: it is not loaded.
        """
        with self._door:
            known = self._known.get(key)
            if known is None or known.leaving is not None:
                raise AdapterRefused(f"{key!r} is not loaded.")
            known.users += 1
            return known

    def release(self, adapter: Adapter) -> None:
        """The end of a `use`; where the adapter was to go, it does after the last."""
        with self._door:
            adapter.users -= 1
            goes = adapter.leaving is not None and adapter.users == 0
        if goes:
            self._let_go(adapter)

    async def load(self, key: str, directory: Path) -> None:
        """See `Engine.load`; files are read beside the generations, and checked and put on the base a little at a time
        between their steps."""
        with self._door:
            self._refuse_if_ended()
            known = self._known.get(key)
            if known is not None and known.leaving is None:
                return
            leaving = known.leaving if known is not None else None
            task = self._loading.get(key)
            mine = task is None
            if task is None:
                task = self._loading[key] = Future()
        if mine and leaving is None:
            self._begin(key, directory, task)
        elif mine:
            leaving.add_done_callback(lambda _: self._begin(key, directory, task))  # type: ignore[union-attr]
        await asyncio.shield(asyncio.wrap_future(task))

    async def combine(self, key: str, parts: Sequence[tuple[str, float]]) -> None:
        """See `Engine.combine`: nothing is computed ahead, the sum is that of each batch's additions."""
        with self._door:
            self._refuse_if_ended()
            if key in self._known and self._known[key].leaving is None:
                return
            missing = [name for name, _ in parts if name not in self._known]
            if missing:
                raise AdapterRefused(f"{missing[0]!r} is not loaded, so nothing can be made of it.")
            apart = [name for name, _ in parts if self._known[name].is_apart]
            if apart:
                raise AdapterRefused(
                    f"{apart[0]!r} runs in rows of its own, so it has no weighted sum with others."
                )
            blend: list[tuple[str, float]] = []
            tasks = [self._known[name].num_tasks for name, _ in parts]
            for name, weight in parts:
                own = self._known[name].choice
                blend += [(own, weight)] if isinstance(own, str) else [(n, w * weight) for n, w in own]
        summed: dict[str, float] = {}
        for name, weight in blend:
            summed[name] = summed.get(name, 0.0) + weight

        def make() -> None:
            check_blend(self._model, list(summed))
            made = Adapter(key, tuple(summed.items()), num_tasks=min(filter(None, tasks), default=0))
            with self._door:
                self._known[key] = made

        await asyncio.wrap_future(self._slices.submit(make))

    async def unload(self, key: str) -> None:
        """See `Engine.unload`."""
        with self._door:
            self._refuse_if_ended()
            known = self._known.get(key)
            if known is None:
                return
            if known.leaving is None:
                known.leaving = Future()
            leaving = known.leaving
            at_rest = known.users == 0
        if at_rest:
            self._let_go(known)
        await asyncio.shield(asyncio.wrap_future(leaving))

    def close(self) -> None:
        """Reads no more files."""
        self._files.shutdown(wait=False, cancel_futures=True)

    def end(self, error: EngineDead) -> None:
        """Fails whoever waits for an adapter to come or to go, and whoever comes later."""
        with self._door:
            self._ended = error
            loading = list(self._loading.values())
            leaving = [each.leaving for each in self._known.values() if each.leaving is not None]
        for waiting in (*loading, *leaving):
            with contextlib.suppress(InvalidStateError):
                waiting.set_exception(error)

    def _refuse_if_ended(self) -> None:
        if self._ended is not None:
            raise EngineDead(str(self._ended))

    def _begin(self, key: str, directory: Path, task: Future[None]) -> None:
        """Has an adapter's files read, then the adapter put on the base."""
        try:
            self._files.submit(self._read, key, directory, task)
        except RuntimeError:  # closed
            self._loaded(key, task, EngineDead("closed"))

    def _loaded(self, key: str, task: Future[None], error: BaseException | None) -> None:
        """Tells whoever waits for a load how it ended. Whatever was wrong with the adapter: the model is as it was, and
        the others serve on."""
        if error is not None and not isinstance(error, (EngineDead, AdapterRefused)):
            refused = AdapterRefused(str(error))
            refused.__cause__ = error
            error = refused
        with self._door:
            self._loading.pop(key, None)
        with contextlib.suppress(InvalidStateError):  # the engine's end was told before
            if error is None:
                task.set_result(None)
            else:
                task.set_exception(error)

    def _let_go(self, adapter: Adapter) -> None:
        with self._door:
            if self._known.get(adapter.key) is not adapter or adapter.users or adapter.leaving is None:
                return
            del self._known[adapter.key]
        leaving, own = adapter.leaving, adapter.choice
        if not isinstance(own, str):
            leaving.set_result(None)
            return

        def told(done: Future[None]) -> None:
            if (error := done.exception()) is None:
                leaving.set_result(None)
            else:
                leaving.set_exception(error)

        self._slices.submit(lambda: self._model.delete_adapter(own)).add_done_callback(told)

    # --- in the thread that reads files

    def _read(self, key: str, directory: Path, task: Future[None]) -> None:
        """Brings the files near, however far they are. What is made of them takes a core, which the steps need, so it
        is done in slices."""
        with contextlib.suppress(OSError):  # told by whoever reads them then
            for file in directory.iterdir():
                with file.open("rb", buffering=0) as bytes_:
                    while bytes_.readinto(self._read_to):
                        pass
        put = self._slices.submit(lambda: self._put_on(key, directory))
        put.add_done_callback(lambda done: self._loaded(key, task, done.exception()))

    # --- in the thread of slices, while the engine's own waits

    def _put_on(self, key: str, directory: Path) -> None:
        """Puts an adapter on the base, and lets it serve once it is seen to."""
        saved = read_servable(directory, self._model.get_base_model())
        # While one that looks ahead is put on, the base's own config is another.
        with pausing(at_once) if looks_ahead(saved.config) else contextlib.nullcontext():
            put_on(self._model, saved, key)
        try:
            if self._model.active_adapters:  # the first; nobody asks without a name
                self._model.set_adapter([])
            config = self._model.peft_config[key]
            made = Adapter(key, key, num_virtual(self._model, key), num_tasks(config), looks_ahead(config))
            check_on_something(self._model, key)
            made.is_apart = runs_apart(
                self._base, self._lane, key, made.virtual_tokens, made.reads_of(0), is_apart=made.is_apart
            )
        except BaseException:
            self._model.delete_adapter(key)
            raise
        with self._door:
            self._known[key] = made
