"""One thread that owns a base and its adapters and answers in batches, whatever the adapters of the rows: what engines
of task heads and of encoders with decoders have in common."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orchestrator.train.rows.task_ids import ARGUMENT
from peft_dist import PeftModel
from peft_dist.errors import PeftDistError

from .engine import AdapterRefused, EngineDead, Figures
from .fair import FairQueue
from .servable import num_tasks, put_sum, read_servable

_HANGS_AFTER_S = 120.0


@dataclass(eq=False)
class Asked:
    """One row from when it was asked until it is answered.

    Args:
        adapter: its key; None: the bare base. queue: whose turn it takes. ids: its tokens, special ones included.
        tell: gives a result or an error to whoever waits, from the engine's thread.
        task: the number of its task, for an adapter that learned several; others pass it over.
    """

    adapter: str | None
    queue: str
    ids: Sequence[int]
    tell: Callable[[Any], None]
    task: int | None = None
    is_left: bool = False
    """Nobody waits any more."""


class TaskEngine(ABC):
    """Loads, unloads and batches of one model, in turns of one thread.

    A batch begins when `max_rows` wait, or a moment after the first came. What waits beside one that runs is the next.

    Args:
        model: the base, on its device.
        task: PEFT's name of what it is loaded for.
        max_rows: of a batch. max_tokens: of a batch's rows together. window_s: how long a first row waits for more.
        one_by_one: each row runs alone, so that its answer is the same to the bit whatever else is asked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: str,
        *,
        max_rows: int = 64,
        max_tokens: int | None = None,
        window_s: float = 0.002,
        one_by_one: bool = False,
    ) -> None:
        self._base: Any = model.eval()
        self._model: Any = PeftModel(model, None)
        self._task = task
        self._max_rows, self._max_tokens = max_rows, max_tokens or 16384
        self._window_s, self._one_by_one = window_s, one_by_one
        self._model.keep_base()
        self._kinds: dict[str | None, tuple[str, int]] = {None: ("", 0)}
        self._tasks: dict[str, int] = {}
        self._users: Counter[str] = Counter()
        self._leaving: dict[str, Future[None]] = {}
        self._fair: FairQueue[Asked] = FairQueue()
        self._turns: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running: list[Asked] = []
        self._num_tokens = 0
        self._first_came = 0.0
        self._began: float | None = None
        self._dead: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # --- asked of it, from any thread

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self._base.get_input_embeddings().weight.shape[0])

    def virtual_tokens(self, adapter: str | None) -> int:
        """See `Engine.virtual_tokens`."""
        return self._kinds.get(adapter, ("", 0))[1]

    def num_tasks(self, adapter: str | None) -> int:
        """See `Engine.num_tasks`."""
        return self._tasks.get(adapter, 0) if adapter else 0

    def loaded(self) -> frozenset[str]:
        """See `Engine.loaded`."""
        with self._changed:
            return frozenset(key for key in self._kinds if key is not None and key not in self._leaving)

    def figures(self) -> Figures:
        """See `Engine.figures`."""
        with self._changed:
            return Figures(
                running=len(self._running),
                waiting=len(self._fair),
                max_running=self._max_rows,
                prompt_tokens=self._num_tokens,
                loaded=len(self._kinds) - 1,
            )

    def check(self) -> None:
        """Raises EngineDead where the thread has ended, or has been at one batch for two minutes."""
        if self._dead is not None or not self._thread.is_alive():
            raise EngineDead(f"the engine has stopped: {self._dead!r}")
        began = self._began
        if began is not None and time.monotonic() - began > _HANGS_AFTER_S:
            raise EngineDead(f"the engine has been at one batch for more than {_HANGS_AFTER_S:.0f} s")

    def close(self) -> None:
        """Ends the thread after the batch that runs; everything that waits fails with EngineDead."""
        with self._changed:
            self._dead = self._dead or EngineDead("closed")
            self._changed.notify_all()

    async def load(self, adapter: str, directory: Path) -> None:
        """See `Engine.load`; files are read and checked beside the batches."""
        self.check()
        with self._changed:
            leaving = self._leaving.get(adapter)
            if adapter in self._kinds and leaving is None:
                return
        if leaving is not None:
            await asyncio.shield(asyncio.wrap_future(leaving))
        try:
            saved = await asyncio.to_thread(read_servable, directory, self._base, (None, self._task))
        except PeftDistError as error:
            raise AdapterRefused(str(error)) from error
        await self._turn(lambda: self._load(adapter, saved, directory))

    async def combine(self, adapter: str, parts: Sequence[tuple[str, float]]) -> None:
        """See `Engine.combine`: as far as `add_weighted_adapter` goes."""
        await self._turn(lambda: self._combine(adapter, parts))

    async def unload(self, adapter: str) -> None:
        """See `Engine.unload`."""
        with self._changed:
            self.check()
            if adapter not in self._kinds:
                return
            leaving = self._leaving.setdefault(adapter, Future())
            self._changed.notify_all()
        await asyncio.shield(asyncio.wrap_future(leaving))

    @contextlib.contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        """Within it an adapter stays loaded.

        Raises:
            AdapterRefused: it is not.
        """
        if adapter is None:
            yield
            return
        with self._changed:
            self.check()
            if adapter not in self._kinds or adapter in self._leaving:
                raise AdapterRefused(f"{adapter!r} is not loaded.")
            self._users[adapter] += 1
        try:
            yield
        finally:
            with self._changed:
                self._users[adapter] -= 1
                self._changed.notify_all()

    def _ask(self, asked: Sequence[Asked]) -> None:
        """Has rows answered, whose adapters are in use."""
        with self._changed:
            self.check()
            if not len(self._fair):
                self._first_came = time.monotonic()
            for each in asked:
                self._fair.push(each.queue, each)
            self._changed.notify_all()

    async def _turn(self, action: Callable[[], Any]) -> None:
        done: Future[Any] = Future()
        with self._changed:
            self.check()
            self._turns.append((action, done))
            self._changed.notify_all()
        await asyncio.shield(asyncio.wrap_future(done))

    # --- what an engine adds, in its own thread

    @abstractmethod
    def _run(self, asked: list[Asked]) -> None:
        """Answers rows whose adapters bring the same kind and number of virtual tokens."""

    @abstractmethod
    def _put_on(self, adapter: str, saved: Any, directory: Path) -> int:
        """Puts an adapter that was read on the base and sees that it answers; returns its virtual tokens.

        Raises:
            AdapterRefused, PeftDistError: it cannot.
        """

    def _take_off(self, adapter: str) -> None:
        """Frees it."""
        self._tasks.pop(adapter, None)
        self._model.delete_adapter(adapter)

    def _task_ids(self, rows: Sequence[Asked]) -> dict[str, Tensor]:
        """The argument of the model's forward that says each row's task, where one of their adapters asks."""
        configs = [self._model.peft_config[row.adapter] for row in rows if row.adapter is not None]
        if not any(num_tasks(config) for config in configs):
            return {}
        return {ARGUMENT: torch.tensor([row.task or 0 for row in rows], device=self._base.device)}

    def _check_sum(self, adapters: Sequence[str]) -> None:
        """Raises AdapterRefused where adapters have no sum for a reason of this task's own."""
        return None

    # --- its thread

    def _work(self) -> None:
        try:
            while self._wait():
                self._take_turns()
                if batch := self._next_batch():
                    self._began = time.monotonic()
                    self._answer(batch)
                    self._began = None
        except BaseException as error:
            self._dead = self._dead or error
            if not isinstance(error, Exception):
                raise
        finally:
            self._began = None
            self._fail_all()

    def _wait(self) -> bool:
        """Until there is something to do; False where the engine is to end."""
        with self._changed:
            while self._dead is None:
                is_free = any(not self._users[key] for key in self._leaving)
                if self._turns or is_free:
                    return True
                if len(self._fair):
                    left = self._first_came + self._window_s - time.monotonic()
                    if len(self._fair) >= self._max_rows or left <= 0:
                        return True
                    self._changed.wait(left)
                else:
                    self._changed.wait(1.0)
        return False

    def _take_turns(self) -> None:
        """What was asked between batches: at most one load, and all that is free to leave."""
        with self._changed:
            free = [key for key in self._leaving if not self._users[key]]
            turn = self._turns.popleft() if self._turns else None
        for key in free:
            with self._changed:
                leaving = self._leaving.pop(key)
                known = self._kinds.pop(key, None)
            try:
                if known is not None:
                    self._take_off(key)
                leaving.set_result(None)
            except Exception as error:
                leaving.set_exception(error)
        if turn is None:
            return
        action, done = turn
        try:
            result = action()
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(result)

    def _next_batch(self) -> list[Asked]:
        with self._changed:
            batch: list[Asked] = []
            before = sum(len(asked.ids) for asked in self._running)
            tokens = before
            while len(self._running) + len(batch) < self._max_rows and tokens < self._max_tokens:
                popped = self._fair.pop()
                if popped is None:
                    break
                queue, asked = popped
                batch.append(asked)
                tokens += len(asked.ids)
                self._fair.served(queue, len(asked.ids))
            self._running = [*self._running, *batch]
            self._num_tokens += tokens - before
        return batch

    def _answer(self, batch: list[Asked]) -> None:
        try:
            waiting = [asked for asked in batch if not asked.is_left]
            for bucket in self._buckets(waiting):
                try:
                    with torch.inference_mode():
                        self._run(bucket)
                except Exception as error:
                    for asked in bucket:
                        asked.tell(error)
        finally:
            with self._changed:
                for asked in batch:
                    self._fair.leave(asked.queue)
                self._running = []

    def _buckets(self, batch: list[Asked]) -> Iterator[list[Asked]]:
        """Rows that are run as one: of alike virtual tokens, and of lengths that leave little padding."""
        kinds: dict[tuple[str, int], list[Asked]] = {}
        for asked in batch:
            kinds.setdefault(self._kinds[asked.adapter], []).append(asked)
        for alike in kinds.values():
            alike.sort(key=lambda asked: len(asked.ids))
            bucket: list[Asked] = []
            for asked in alike:
                is_full = bucket and (len(bucket) + 1) * len(asked.ids) > self._max_tokens
                if bucket and (is_full or self._one_by_one or len(asked.ids) > 2 * len(bucket[0].ids) + 16):
                    yield bucket
                    bucket = []
                bucket.append(asked)
            yield bucket

    def _load(self, adapter: str, saved: Any, directory: Path) -> None:
        if adapter in self._kinds:
            return
        try:
            with torch.inference_mode(False):
                virtual = self._put_on(adapter, saved, directory)
        except AdapterRefused:
            raise
        except Exception as error:  # whatever its files hold: the model is as it was, and the others serve on
            raise AdapterRefused(str(error)) from error
        config = self._model.peft_config[adapter]
        kind = str(getattr(config.peft_type, "value", config.peft_type)) if virtual else ""
        with self._changed:
            self._kinds[adapter], self._tasks[adapter] = (kind, virtual), num_tasks(config)

    def _combine(self, adapter: str, parts: Sequence[tuple[str, float]]) -> None:
        if adapter in self._kinds:
            return
        names = [name for name, _ in parts]
        if missing := [name for name in names if name not in self._kinds]:
            raise AdapterRefused(f"{missing[0]!r} is not loaded, so nothing can be made of it.")
        self._check_sum(names)
        put_sum(self._model, adapter, parts)
        with self._changed:
            self._kinds[adapter] = ("", 0)

    def _fail_all(self) -> None:
        with self._changed:
            self._dead = self._dead or EngineDead("its thread has ended")
            gone = EngineDead(f"the engine has stopped: {self._dead!r}")
            waiting = list(self._running)
            while (popped := self._fair.pop()) is not None:
                queue, asked = popped
                # Else a queue that has all its places is given no more of what it waits for.
                self._fair.leave(queue)
                waiting.append(asked)
            futures = [done for _, done in self._turns] + list(self._leaving.values())
            self._turns.clear()
        for asked in waiting:
            asked.tell(gone)
        for done in futures:
            with contextlib.suppress(Exception):
                done.set_exception(gone)
