"""An engine that generates one sequence at a time, in the order of asking, by transformers' `generate`."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from orchestrator.train.rows.task_ids import ARGUMENT
from peft_dist import PeftModel, Rows
from peft_dist.rows import BASE

from .engine import AdapterRefused, EngineDead, Figures, Generation, Piece, ScoresNotFinite, TokenLogprob
from .pieces import cut_off, pieces_of
from .sampling import generation_config, logprob_of
from .servable import num_tasks, put_on, put_sum, read_servable
from .text import TextStream

Decode = Callable[[Sequence[int]], str]


@dataclass
class _Task:
    """One turn of the engine's thread."""

    run: Callable[[], None]
    fail: Callable[[BaseException], None]


@dataclass
class _Stream:
    """Pieces on their way from the engine's thread to one request."""

    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | BaseException] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def put(self, item: Piece | BaseException) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)


class SequentialEngine:
    """One thread that owns the model: generations, loads and unloads in the order of asking.

    Args:
        model: the base, on its device, of a causal language model.
        decode: token ids to text, without special tokens.
        eos_ids: the tokens that end an answer.
        max_context: tokens of prompt and answer together.
    """

    def __init__(
        self, model: PreTrainedModel, decode: Decode, eos_ids: frozenset[int], max_context: int
    ) -> None:
        self._base: Any = model.eval()
        self._model: Any = PeftModel(model, None)
        self._model.keep_base()
        self._virtual_tokens: dict[str, int] = {}
        self._tasks_of: dict[str, int] = {}
        self._decode, self._eos_ids, self._max_context = decode, eos_ids, max_context
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._dead: BaseException | None = None
        self._running, self._prompt_tokens = 0, 0
        self._door = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

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
        return self._virtual_tokens.get(adapter, 0) if adapter else 0

    def num_tasks(self, adapter: str | None) -> int:
        """See `Engine.num_tasks`."""
        return self._tasks_of.get(adapter, 0) if adapter else 0

    def loaded(self) -> frozenset[str]:
        """The keys that are loaded."""
        return frozenset(self._virtual_tokens)

    async def load(self, adapter: str, directory: Path) -> None:
        """See `Engine.load`; waits for the generations that were asked for before."""

        await self._turn(lambda: self._load(adapter, directory))

    async def combine(self, adapter: str, parts: Sequence[tuple[str, float]]) -> None:
        """See `Engine.combine`: as far as `add_weighted_adapter` goes."""
        await self._turn(lambda: self._combine(adapter, parts))

    async def unload(self, adapter: str) -> None:
        """See `Engine.unload`."""
        await self._turn(lambda: self._unload(adapter))

    async def generate(self, request: Generation) -> AsyncGenerator[Piece, None]:
        """See `Engine.generate`."""
        stream = _Stream(asyncio.get_running_loop())
        self._submit(_Task(lambda: self._generate(request, stream), stream.put))
        try:
            while True:
                piece = await stream.pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            stream.cancelled.set()

    def figures(self) -> Figures:
        """See `Engine.figures`; no caches, no slots."""
        return Figures(
            running=self._running,
            waiting=self._tasks.qsize(),
            prompt_tokens=self._prompt_tokens,
            loaded=len(self._virtual_tokens),
        )

    def check(self) -> None:
        """Raises EngineDead where the thread has ended."""
        if self._dead is not None or not self._thread.is_alive():
            raise EngineDead(f"the engine has stopped: {self._dead!r}")

    def close(self) -> None:
        """Ends the thread after the turn that runs; everything that waits fails with EngineDead."""
        with self._door:
            self._dead = self._dead or EngineDead("closed")
        self._tasks.put(None)

    async def _turn(self, action: Callable[[], None]) -> None:
        done: Future[None] = Future()

        def run() -> None:
            action()
            done.set_result(None)

        self._submit(_Task(run, done.set_exception))
        await asyncio.wrap_future(done)

    def _submit(self, task: _Task) -> None:
        with self._door:
            self.check()
            self._tasks.put(task)

    def _work(self) -> None:
        try:
            while (task := self._tasks.get()) is not None:
                if self._dead is not None:
                    task.fail(EngineDead(f"the engine has stopped: {self._dead!r}"))
                    continue
                try:
                    task.run()
                except Exception as error:
                    task.fail(error)
                except BaseException as error:
                    task.fail(EngineDead(repr(error)))
                    raise
        except BaseException as error:
            self._dead = error
        finally:
            with self._door:
                self._dead = self._dead or EngineDead("its thread has ended")
                while not self._tasks.empty():
                    if (task := self._tasks.get()) is not None:
                        task.fail(EngineDead(f"the engine has stopped: {self._dead!r}"))

    def _load(self, adapter: str, directory: Path) -> None:
        if adapter in self._virtual_tokens:
            return
        try:
            put_on(self._model, read_servable(directory, self._base), adapter)
        except Exception as error:  # whatever its files hold: the model is as it was, and the others serve on
            raise AdapterRefused(str(error)) from error
        self._model.eval()
        config = self._model.peft_config[adapter]
        self._tasks_of[adapter] = num_tasks(config)
        self._virtual_tokens[adapter] = int(getattr(config, "num_virtual_tokens", None) or 0)

    def _combine(self, adapter: str, parts: Sequence[tuple[str, float]]) -> None:
        if adapter in self._virtual_tokens:
            return
        put_sum(self._model, adapter, parts)
        self._tasks_of[adapter] = 0
        self._virtual_tokens[adapter] = 0

    def _unload(self, adapter: str) -> None:
        self._tasks_of.pop(adapter, None)
        if self._virtual_tokens.pop(adapter, None) is not None:
            self._model.delete_adapter(adapter)

    def _generate(self, request: Generation, stream: _Stream) -> None:
        if stream.cancelled.is_set():
            return
        self._running = 1
        self._prompt_tokens += len(request.prompt_ids)
        try:
            self._run(request, stream)
        finally:
            self._running = 0

    @torch.inference_mode()
    def _run(self, request: Generation, stream: _Stream) -> None:
        notes = None if request.logprobs is None else _Notes(request.logprobs)
        tap = _Tap(TextStream(self._decode, request.stop), self._eos_ids, stream, notes)
        if request.draws:
            torch.manual_seed(request.seed if request.seed is not None else torch.seed() % 2**63)
        ids = torch.tensor([request.prompt_ids], device=self._base.device)
        with self._model.using(Rows(adapters=(request.adapter or BASE,))):
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **self._task_ids(request),
                generation_config=generation_config(self._base, request, self._eos_ids),
                logits_processor=LogitsProcessorList([_Finite(), *([notes] if notes else [])]),
                stopping_criteria=StoppingCriteriaList([tap]),
            )
        if not tap.ended:
            stream.put(cut_off(tap.text))

    def _task_ids(self, request: Generation) -> dict[str, Any]:
        """The argument of generate that says the sequence's task, for an adapter that asks."""
        if not self.num_tasks(request.adapter):
            return {}
        return {ARGUMENT: torch.tensor([request.task or 0], device=self._base.device)}


class _Tap(StoppingCriteria):
    """Sees each new token before transformers asks whether to go on; gives its text out and may say stop."""

    def __init__(
        self, text: TextStream, eos_ids: frozenset[int], stream: _Stream, notes: _Notes | None
    ) -> None:
        self.text, self._eos_ids, self._stream, self._notes = text, eos_ids, stream, notes
        self.ended = False

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        """Whether each sequence is done (batch,)."""
        return torch.full((input_ids.shape[0],), self._take(int(input_ids[0, -1])), device=input_ids.device)

    def _take(self, token: int) -> bool:
        if self._stream.cancelled.is_set():
            self.ended = True
            return True
        (piece,) = pieces_of(token, self.text, self._eos_ids, self._noted(token))
        self.ended = piece.finish_reason is not None
        self._stream.put(piece)
        return self.ended

    def _noted(self, token: int) -> tuple[TokenLogprob, ...]:
        return (self._notes.of(token),) if self._notes else ()


class _Finite(LogitsProcessor):
    """Lets nothing be chosen by what are no numbers, and changes nothing."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The scores (1, vocabulary), as they are; some may be -inf, which other processors put there."""
        if not scores.max().isfinite():
            raise ScoresNotFinite
        return scores


class _Notes(LogitsProcessor):
    """Sees each step's scores before temperature and top-p, and changes nothing."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._logprobs = torch.empty(0)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The scores (1, vocabulary), as they are."""
        self._logprobs = scores[0].float().log_softmax(-1)
        return scores

    def of(self, token: int) -> TokenLogprob:
        """What the last step says of the token that was taken."""
        return logprob_of(self._logprobs, token, self._num_top)
