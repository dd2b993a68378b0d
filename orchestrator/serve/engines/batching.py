"""An engine that generates many sequences at once: adapters of any method, and the bare base, in one batch."""

from __future__ import annotations

import asyncio
import gc
import itertools
import statistics
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from peft_dist import PeftModel

from .apart import ApartLane
from .engine import EngineDead, Figures, Generation, Piece
from .fitting import batches_of, sizes_for
from .live_sequence import LiveSequence, Stream
from .loaded_adapters import LoadedAdapters
from .packed_base import PackedBase
from .slices import Slices
from .steps import Steps
from .text import TextStream
from .turns import Turns

Decode = Callable[[Sequence[int]], str]

_HANGS_AFTER_S = 120.0
_SHARE_APART = 4
"""Of the cache's tokens, what sequences that run apart may have beside it: one in so many."""
_ENDS_WITHIN_S = 10.0
_SLICE = 0.5
"""Of a median step: what adapters that come and go may take between two steps."""
_IDLE_SLICE_S = 0.02
_STEPS = 64
"""Steps of which the median is taken."""


class BatchingEngine:
    """One thread that owns the model; between two steps it takes in and lets go of sequences, and has a little done of
    what adapters need that come or go.

    A sequence is served by the adapter that had its key when it was asked: a key is a version's content hash, and
    an adapter goes when nobody uses it any more. Cached prefixes are shared within one key only.

    Args:
        model: the base, on its device, of a decoder.
        decode: token ids to text, without special tokens.
        eos_ids: the tokens that end an answer.
        max_context: tokens of prompt and answer together.
        max_sequences: of one batch; more wait their turn. max_batch_tokens: of one step.
        cache_bytes: memory of keys and values; what `max_sequences` can use, at most a quarter of the device's
            memory, where None.
        deterministic: log-probabilities are the same to the bit, alone or in any batch; fp32 on a CPU only.

    Raises:
        ValueError: `deterministic` for another dtype or device.
        UnfitBase: a base that cannot be run so.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decode: Decode,
        eos_ids: frozenset[int],
        max_context: int,
        *,
        max_sequences: int = 64,
        max_batch_tokens: int | None = None,
        cache_bytes: int | None = None,
        deterministic: bool = False,
    ) -> None:
        if deterministic and (model.device.type != "cpu" or model.dtype != torch.float32):
            raise ValueError(
                f"deterministic: is for fp32 on a CPU; this base is {model.dtype} on {model.device.type}. Leave it out."
            )
        self._base: Any = model.eval()
        self._model: Any = PeftModel(model, None)
        self._model.keep_base()
        self._decode = decode
        sizes = sizes_for(model, max_context, max_sequences, max_batch_tokens, cache_bytes)
        self._batches = batches_of(self._base, sizes, one_by_one=deterministic)
        self._max_context = min(max_context, self._batches.max_length - 1)
        room = sizes.num_blocks * sizes.page_size // _SHARE_APART
        self._lane = ApartLane(self._model, room, sizes.max_batch_tokens, one_by_one=deterministic)
        packed = PackedBase(self._model, deterministic=deterministic)
        self._wake = threading.Event()
        self._slices = Slices(self._wake.set)
        self._adapters = LoadedAdapters(self._model, packed, self._lane, self._slices)
        self._turns = Turns(self._wake.set)
        self._steps = Steps(
            self._base, packed, self._batches, self._lane, self._turns, self._adapters, eos_ids
        )
        self._numbers = itertools.count()
        self._took: deque[tuple[float, float]] = deque(maxlen=_STEPS)
        self._dead: BaseException | None = None
        self._step_began: float | None = None
        # The collector would walk the base's and the libraries' objects again and again, for several steps' time.
        gc.freeze()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # --- what is asked of it, from any thread

    @property
    def max_context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._max_context

    @property
    def vocab_size(self) -> int:
        """Rows of the base's embedding."""
        return int(self._base.get_input_embeddings().weight.shape[0])

    def virtual_tokens(self, adapter: str | None) -> int:
        """Tokens that a prompt method's adapter puts before the prompt."""
        known = self._adapters.get(adapter)
        return known.virtual_tokens if known else 0

    def num_tasks(self, adapter: str | None) -> int:
        """See `Engine.num_tasks`."""
        known = self._adapters.get(adapter)
        return known.num_tasks if known else 0

    def loaded(self) -> frozenset[str]:
        """The keys that are loaded."""
        return self._adapters.keys()

    def figures(self) -> Figures:
        """See `Engine.figures`."""
        running, waiting = self._turns.counts()
        return Figures(
            running=running,
            waiting=waiting,
            max_running=self._batches.sizes.max_sequences,
            prompt_tokens=self._steps.prompt_tokens,
            cached_tokens=self._batches.shared_tokens,
            loaded=len(self._adapters),
        )

    async def load(self, adapter: str, directory: Path) -> None:
        """See `LoadedAdapters.load`."""
        self._refuse_if_dead()
        await self._adapters.load(adapter, directory)

    async def combine(self, adapter: str, parts: Sequence[tuple[str, float]]) -> None:
        """See `LoadedAdapters.combine`."""
        self._refuse_if_dead()
        await self._adapters.combine(adapter, parts)

    async def unload(self, adapter: str) -> None:
        """See `Engine.unload`."""
        self._refuse_if_dead()
        await self._adapters.unload(adapter)

    async def generate(self, request: Generation) -> AsyncGenerator[Piece, None]:
        """See `Engine.generate`."""
        sequence = self._asked(request, asyncio.get_running_loop())
        try:
            while True:
                piece = await sequence.stream.pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self._turns.leave(sequence)

    def check(self) -> None:
        """Raises EngineDead where the thread has ended, or has been at one step for two minutes."""
        self._refuse_if_dead()
        began = self._step_began
        if began is not None and time.monotonic() - began > _HANGS_AFTER_S:
            raise EngineDead(f"the engine has been at one step for more than {_HANGS_AFTER_S:.0f} s")

    def close(self) -> None:
        """Ends the thread after the step that runs; everything that runs or waits fails with EngineDead."""
        self._dead = self._dead or EngineDead("closed")
        self._wake.set()
        self._adapters.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=_ENDS_WITHIN_S)
        gc.unfreeze()

    # --- in the callers' threads

    def _refuse_if_dead(self) -> None:
        if self._dead is not None or not self._thread.is_alive():
            raise EngineDead(f"the engine has stopped: {self._dead!r}")

    def _asked(self, request: Generation, loop: asyncio.AbstractEventLoop) -> LiveSequence:
        self._refuse_if_dead()
        adapter = self._adapters.use(request.adapter) if request.adapter is not None else None
        try:
            text = TextStream(self._decode, request.stop)
            sequence = LiveSequence(f"{next(self._numbers)}", request, adapter, Stream(loop), text)
            virtual = adapter.virtual_tokens if adapter else 0
            length = virtual + len(request.prompt_ids) + request.max_tokens
            if not request.prompt_ids or length > self._max_context + 1:
                raise ValueError(
                    f"{len(request.prompt_ids)} tokens of a prompt, {virtual} virtual ones and max_tokens "
                    f"{request.max_tokens} do not fit the context of {self._max_context}."
                )
            self._turns.ask(sequence)
        except BaseException:
            if adapter is not None:
                self._adapters.release(adapter)
            raise
        return sequence

    # --- in the engine's own thread

    def _work(self) -> None:
        try:
            while self._dead is None:
                self._steps.admit()
                step = self._steps.next_step()
                apart = self._lane.next_step()
                is_idle = step is None and not apart
                self._step_began = began = time.monotonic()
                cpu_began = time.thread_time()
                if step is not None:
                    self._steps.run(step)
                for each in apart:
                    self._steps.run_apart(each)
                self._steps.send()
                if not is_idle:
                    self._took.append((time.monotonic() - began, time.thread_time() - cpu_began))
                worked = self._slices.has_work and self._slices.give(*self._slice(is_idle))
                self._step_began = None
                if is_idle and not worked:
                    if not self._slices.has_work and not self._turns.has_news:
                        self._wake.wait(timeout=1.0)
                    self._wake.clear()
        except BaseException as error:
            self._dead = self._dead or error
            if not isinstance(error, Exception):
                raise
        finally:
            self._step_began = None
            self._dead = self._dead or EngineDead("its thread has ended")
            gone = EngineDead(f"the engine has stopped: {self._dead!r}")
            self._steps.end(gone)
            self._slices.end(gone)
            self._adapters.end(gone)

    def _slice(self, idle: bool) -> tuple[float, float]:
        """Seconds that others may have before the next step, and of them on a core."""
        if idle or not self._took:
            return _IDLE_SLICE_S, _IDLE_SLICE_S
        seconds, cpu_seconds = (statistics.median(each) for each in zip(*self._took, strict=True))
        return _SLICE * seconds, _SLICE * cpu_seconds
