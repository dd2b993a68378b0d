"""An engine that generates many sequences at once: adapters of any method, and the bare base, in one batch."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_dist import PeftModel
from peft_dist.ahead import looks_ahead
from peft_dist.errors import RowsError
from peft_dist.packed_rows import Blend, PackedRows, Reads
from peft_dist.pauses import pausing
from peft_dist.prompts.packed import num_virtual, packed_embeds, packed_past
from peft_dist.rows import BASE

from ..machine import free_bytes
from ..train.task_ids import ARGUMENT
from .apart import Apart, ApartLane
from .continuous import ContinuousBatches, Packed, Part, Sizes, Step, UnfitBase
from .engine import AdapterRefused, EngineDead, Figures, Generation, Piece, TokenLogprob
from .fair import FairQueue
from .pieces import pieces_of
from .row_tiles import RowTiles
from .sampling import Sampler, logprob_of
from .servable import check_blend, check_on_something, num_tasks, put_on, read_servable
from .slices import Slices
from .step_cost import StepCost
from .text import TextStream

Decode = Callable[[Sequence[int]], str]

_HANGS_AFTER_S = 120.0
_SHARE_APART = 4
"""Of the cache's tokens, what sequences that run apart may have beside it: one in so many."""
_ENDS_WITHIN_S = 10.0
_SLICE = 0.5
"""Of a median step: what adapters that come and go may take between two steps."""
_IDLE_SLICE_S = 0.02
_LATE = 0.25
"""Of a step's time: what prompts of a flooded queue may add to it while others have less to do."""
_STEPS = 64
"""Steps of which the median is taken."""
_log = logging.getLogger(__name__)


class StepFailed(RuntimeError):
    """The forward in which a sequence was failed; nothing is known of whose fault it was."""


@dataclass(eq=False)
class _Stream:
    """Pieces on their way from the engine's thread to one request."""

    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | BaseException] = field(default_factory=asyncio.Queue)


@dataclass(eq=False)
class _Sequence:
    """One request from when it was asked until it is answered."""

    name: str
    request: Generation
    choice: str | Blend
    stream: _Stream
    text: TextStream
    ids: list[int]
    """The prompt and what was generated, without virtual tokens."""
    sampler: Sampler | None = None
    num_generated: int = 0
    runs: bool = False
    reads: Reads = ()
    """What its adapter's methods read of it: its task."""
    apart: Apart | None = None
    """Itself, where it runs in rows of its own."""

    @property
    def queue(self) -> str:
        return self.request.queue or self.request.adapter or ""


@dataclass
class _Adapter:
    """A key that was loaded: what serves it, and how many sequences use it."""

    choice: str | Blend
    virtual_tokens: int = 0
    num_tasks: int = 0
    is_apart: bool = False
    """Whether no packed row can hold its sequences beside others'."""
    users: int = 0
    leaving: Future[None] | None = None


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
        self._decode, self._eos_ids = decode, eos_ids
        self._deterministic = deterministic
        sizes = sizes_for(model, max_context, max_sequences, max_batch_tokens, cache_bytes)
        self._batches = _batches_of(self._base, sizes, one_by_one=deterministic)
        self._max_context = min(max_context, self._batches.max_length - 1)
        room = sizes.num_blocks * sizes.page_size // _SHARE_APART
        self._lane = ApartLane(self._model, room, sizes.max_batch_tokens, one_by_one=deterministic)
        self._adapters: dict[str, _Adapter] = {}
        self._sequences: dict[str, _Sequence] = {}
        self._fair: FairQueue[_Sequence] = FairQueue()
        self._left: deque[_Sequence] = deque()
        self._loading: dict[str, Future[None]] = {}
        self._files = ThreadPoolExecutor(1, thread_name_prefix="adapter-files")
        self._read_to = bytearray(2**20)
        self._numbers = itertools.count()
        self._prompt_tokens = 0
        self._door = threading.Lock()
        self._wake = threading.Event()
        self._slices = Slices(self._wake.set)
        self._took: deque[tuple[float, float]] = deque(maxlen=_STEPS)
        self._cost = StepCost()
        self._dead: BaseException | None = None
        self._step_began: float | None = None
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Piece | BaseException]]] = {}
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
        known = self._adapters.get(adapter) if adapter else None
        return known.virtual_tokens if known else 0

    def num_tasks(self, adapter: str | None) -> int:
        """See `Engine.num_tasks`."""
        known = self._adapters.get(adapter) if adapter else None
        return known.num_tasks if known else 0

    def loaded(self) -> frozenset[str]:
        """The keys that are loaded."""
        with self._door:
            return frozenset(key for key, adapter in self._adapters.items() if adapter.leaving is None)

    def figures(self) -> Figures:
        """See `Engine.figures`."""
        with self._door:
            return Figures(
                running=sum(each.runs for each in self._sequences.values()),
                waiting=len(self._fair),
                max_running=self._batches.sizes.max_sequences,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._batches.shared_tokens,
                loaded=len(self._adapters),
            )

    async def load(self, adapter: str, directory: Path) -> None:
        """See `Engine.load`; files are read beside the generations, and checked and put on the base a little at a time
        between their steps."""
        with self._door:
            self._refuse_if_dead()
            known = self._adapters.get(adapter)
            if known is not None and known.leaving is None:
                return
            leaving = known.leaving if known is not None else None
            task = self._loading.get(adapter)
            mine = task is None
            if task is None:
                task = self._loading[adapter] = Future()
        if mine and leaving is None:
            self._begin(adapter, directory, task)
        elif mine:
            leaving.add_done_callback(lambda _: self._begin(adapter, directory, task))  # type: ignore[union-attr]
        await asyncio.shield(asyncio.wrap_future(task))

    async def combine(self, adapter: str, parts: Sequence[tuple[str, float]]) -> None:
        """See `Engine.combine`: nothing is computed ahead, the sum is that of each batch's additions."""
        with self._door:
            self._refuse_if_dead()
            if adapter in self._adapters and self._adapters[adapter].leaving is None:
                return
            missing = [name for name, _ in parts if name not in self._adapters]
            if missing:
                raise AdapterRefused(f"{missing[0]!r} is not loaded, so nothing can be made of it.")
            apart = [name for name, _ in parts if self._adapters[name].is_apart]
            if apart:
                raise AdapterRefused(
                    f"{apart[0]!r} runs in rows of its own, so it has no weighted sum with others."
                )
            blend: list[tuple[str, float]] = []
            tasks = [self._adapters[name].num_tasks for name, _ in parts]
            for name, weight in parts:
                own = self._adapters[name].choice
                blend += [(own, weight)] if isinstance(own, str) else [(n, w * weight) for n, w in own]
        summed: dict[str, float] = {}
        for name, weight in blend:
            summed[name] = summed.get(name, 0.0) + weight

        def make() -> None:
            check_blend(self._model, list(summed))
            with self._door:
                self._adapters[adapter] = _Adapter(
                    tuple(summed.items()), num_tasks=min(filter(None, tasks), default=0)
                )

        await asyncio.wrap_future(self._slices.submit(make))

    async def unload(self, adapter: str) -> None:
        """See `Engine.unload`."""
        with self._door:
            self._refuse_if_dead()
            known = self._adapters.get(adapter)
            if known is None:
                return
            if known.leaving is None:
                known.leaving = Future()
            leaving = known.leaving
            at_rest = known.users == 0
        if at_rest:
            self._let_go(adapter)
        await asyncio.shield(asyncio.wrap_future(leaving))

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
            self._left.append(sequence)
            self._wake.set()

    def check(self) -> None:
        """Raises EngineDead where the thread has ended, or has been at one step for two minutes."""
        self._refuse_if_dead()
        began = self._step_began
        if began is not None and time.monotonic() - began > _HANGS_AFTER_S:
            raise EngineDead(f"the engine has been at one step for more than {_HANGS_AFTER_S:.0f} s")

    def close(self) -> None:
        """Ends the thread after the step that runs; everything that runs or waits fails with EngineDead."""
        with self._door:
            self._dead = self._dead or EngineDead("closed")
        self._wake.set()
        self._files.shutdown(wait=False, cancel_futures=True)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=_ENDS_WITHIN_S)
        gc.unfreeze()

    # --- in the callers' threads

    def _refuse_if_dead(self) -> None:
        if self._dead is not None or not self._thread.is_alive():
            raise EngineDead(f"the engine has stopped: {self._dead!r}")

    def _asked(self, request: Generation, loop: asyncio.AbstractEventLoop) -> _Sequence:
        sequence = _Sequence(
            f"{next(self._numbers)}",
            request,
            BASE,
            _Stream(loop),
            TextStream(self._decode, request.stop),
            list(request.prompt_ids),
        )
        with self._door:
            self._refuse_if_dead()
            known = None
            if request.adapter is not None:
                known = self._adapters.get(request.adapter)
                if known is None or known.leaving is not None:
                    raise AdapterRefused(f"{request.adapter!r} is not loaded.")
                sequence.choice = known.choice
                sequence.reads = _reads_of(request, known.num_tasks)
            virtual = known.virtual_tokens if known else 0
            length = virtual + len(request.prompt_ids) + request.max_tokens
            if not request.prompt_ids or length > self._max_context + 1:
                raise ValueError(
                    f"{len(request.prompt_ids)} tokens of a prompt, {virtual} virtual ones and max_tokens "
                    f"{request.max_tokens} do not fit the context of {self._max_context}."
                )
            if known:
                known.users += 1
            self._sequences[sequence.name] = sequence
            self._fair.push(sequence.queue, sequence)
        self._wake.set()
        return sequence

    def _begin(self, key: str, directory: Path, task: Future[None]) -> None:
        """Has an adapter's files read, then the adapter put on the base."""
        try:
            self._files.submit(self._read, key, directory, task)
        except RuntimeError:  # closed
            self._loaded(key, task, EngineDead("closed"))

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

    # --- in the thread of slices, while the engine's own waits

    def _put_on(self, key: str, directory: Path) -> None:
        """Puts an adapter on the base, and lets it serve once it is seen to."""
        saved = read_servable(directory, self._base)
        # While one that looks ahead is put on, the base's own config is another.
        with pausing(_at_once) if looks_ahead(saved.config) else contextlib.nullcontext():
            put_on(self._model, saved, key)
        try:
            if self._model.active_adapters:  # the first; nobody asks without a name
                self._model.set_adapter([])
            config = self._model.peft_config[key]
            made = _Adapter(key, num_virtual(self._model, key), num_tasks(config), looks_ahead(config))
            check_on_something(self._model, key)
            self._try(made)
        except BaseException:
            self._model.delete_adapter(key)
            raise
        with self._door:
            self._adapters[key] = made

    # --- in the engine's own thread

    def _work(self) -> None:
        try:
            while self._dead is None:
                self._let_leave()
                self._admit()
                step = self._next_step()
                apart = self._lane.next_step()
                is_idle = step is None and not apart
                self._step_began = began = time.monotonic()
                cpu_began = time.thread_time()
                if step is not None:
                    self._run(step)
                    self._send()
                    self._cost.took(sum(part.length for part in step.parts), time.monotonic() - began)
                for each in apart:
                    self._run_apart(each)
                self._send()
                if not is_idle:
                    self._took.append((time.monotonic() - began, time.thread_time() - cpu_began))
                worked = self._slices.has_work and self._slices.give(*self._slice(is_idle))
                self._step_began = None
                if is_idle and not worked:
                    if not self._slices.has_work and not self._left and not len(self._fair):
                        self._wake.wait(timeout=1.0)
                    self._wake.clear()
        except BaseException as error:
            self._dead = self._dead or error
            if not isinstance(error, Exception):
                raise
        finally:
            self._step_began = None
            with self._door:
                self._dead = self._dead or EngineDead("its thread has ended")
                gone = EngineDead(f"the engine has stopped: {self._dead!r}")
                loading = list(self._loading.values())
            for sequence in self._sequences.values():
                self._give(sequence, gone)
            self._send()
            self._slices.end(gone)
            for task in loading:
                with contextlib.suppress(InvalidStateError):
                    task.set_exception(gone)
            for adapter in self._adapters.values():
                if adapter.leaving is not None and not adapter.leaving.done():
                    adapter.leaving.set_exception(gone)

    def _next_step(self) -> Step | None:
        with self._door:
            late = self._fair.late()
        if not late:
            return self._batches.next_step(self._place)
        return self._batches.next_step(
            self._place,
            lambda name: self._sequences[name].queue in late,
            self._cost.addable(self._batches.num_sequences, _LATE),
        )

    def _slice(self, idle: bool) -> tuple[float, float]:
        """Seconds that others may have before the next step, and of them on a core."""
        if idle or not self._took:
            return _IDLE_SLICE_S, _IDLE_SLICE_S
        seconds, cpu_seconds = (statistics.median(each) for each in zip(*self._took, strict=True))
        return _SLICE * seconds, _SLICE * cpu_seconds

    def _let_leave(self) -> None:
        while self._left:
            sequence = self._left.popleft()
            if sequence.name in self._sequences:
                self._end(sequence)

    def _place(self, name: str) -> tuple[str, str]:
        """Where a sequence stands in a packed row: beside those that its adapter serves alike."""
        sequence = self._sequences[name]
        return str(sequence.choice), str(sequence.reads)

    def _admit(self) -> None:
        while self._batches.num_sequences + len(self._lane) < self._batches.sizes.max_sequences:
            with self._door:
                popped = self._fair.pop()
            if popped is None:
                return
            _, sequence = popped
            sequence.runs = True
            try:
                sequence.sampler = Sampler(self._base, sequence.request, self._eos_ids)
            except Exception as error:
                self._give(sequence, error)
                self._end(sequence)
                continue
            virtual = self.virtual_tokens(sequence.request.adapter)
            tokens = (0,) * virtual + sequence.request.prompt_ids
            self._prompt_tokens += len(tokens)
            if self._is_apart(sequence):
                assert isinstance(sequence.choice, str)
                need = (len(tokens) + sequence.request.max_tokens) * self._lane.runs_of(sequence.choice)
                sequence.apart = Apart(sequence.name, sequence.choice, list(tokens), need, sequence.reads)
                self._lane.add(sequence.apart)
                continue
            salt = sequence.choice if isinstance(sequence.choice, str) else repr(sequence.choice)
            # Keys and values of one task are another's no more than those of another adapter.
            salt += repr(sequence.reads) if sequence.reads else ""
            self._batches.add(sequence.name, tokens, salt)

    def _is_apart(self, sequence: _Sequence) -> bool:
        known = self._adapters.get(sequence.request.adapter) if sequence.request.adapter else None
        return known is not None and known.is_apart

    def _run(self, step: Step) -> None:
        """One forward and what follows from it. Where it fails, its sequences do, and the others go on."""
        sequences = [self._sequences[part.sequence] for part in step.parts]
        try:
            with torch.inference_mode():
                logits = self._forward(step, sequences)
                last = [s for s, part in zip(sequences, step.parts, strict=True) if part.is_last]
                chosen = self._choose(last, logits)
        except Exception as error:
            self._fail(sequences, error)
            return
        self._batches.take(step, {s.name: token for s, (token, _) in zip(last, chosen, strict=True)})
        with self._door:
            for sequence, part in zip(sequences, step.parts, strict=True):
                self._fair.served(sequence.queue, part.length)
        for sequence, (token, note) in zip(last, chosen, strict=True):
            self._say(sequence, token, note)

    def _run_apart(self, apart: Apart) -> None:
        """One step of a sequence in rows of its own."""
        sequence = self._sequences[apart.name]
        try:
            with torch.inference_mode():
                num, scores = self._lane.run(apart, self._outputs)
                chosen = self._choose([sequence], scores[None]) if scores is not None else []
        except Exception as error:
            self._fail([sequence], error)
            return
        with self._door:
            self._fair.served(sequence.queue, num)
        for token, note in chosen:
            apart.tokens.append(token)
            self._say(sequence, token, note)

    def _fail(self, sequences: Sequence[_Sequence], error: Exception) -> None:
        _log.error("a step of %d sequences failed", len(sequences), exc_info=error)
        for sequence in sequences:
            self._give(sequence, StepFailed(f"{type(error).__name__}: {error}"))
            self._end(sequence)

    def _forward(self, step: Step, sequences: list[_Sequence]) -> Tensor:
        """Scores (kept sequences, vocabulary) in fp32."""
        rows = PackedRows(
            adapters=tuple(s.choice for s in sequences),  # type: ignore[misc]
            lengths=tuple(part.length for part in step.parts),
            starts=tuple(part.start for part in step.parts),
            reads=tuple(s.reads for s in sequences),
            kept=tuple(i for i, part in enumerate(step.parts) if part.is_last),
            alone=self._deterministic,
        )
        return self._scores(rows, dict(step.inputs))

    def _scores(self, rows: PackedRows, inputs: dict[str, Any]) -> Tensor:
        return self._outputs(rows, inputs).logits[0].float()

    def _outputs(self, rows: PackedRows, inputs: dict[str, Any]) -> Any:
        tiles = RowTiles() if self._deterministic else contextlib.nullcontext()
        with self._model.using(rows), tiles:
            embeds = packed_embeds(self._model, rows, inputs["input_ids"])
            if embeds is not None:
                del inputs["input_ids"]
                inputs["inputs_embeds"] = embeds
            inputs["packed"].past = packed_past(self._model, rows, self._base.dtype)
            return self._base(**inputs)

    def _choose(self, sequences: list[_Sequence], logits: Tensor) -> list[tuple[int, TokenLogprob | None]]:
        if not sequences:
            return []
        likeliest = logits.argmax(-1).tolist()
        chosen = []
        for row, sequence in enumerate(sequences):
            sampler = sequence.sampler
            assert sampler is not None
            token = likeliest[row]
            if not sampler.takes_the_likeliest:
                token = sampler.choose(logits[row], sequence.ids)
            note = None
            if sequence.request.logprobs is not None:
                note = logprob_of(logits[row].log_softmax(-1), token, sequence.request.logprobs)
            chosen.append((token, note))
        return chosen

    def _say(self, sequence: _Sequence, token: int, note: TokenLogprob | None) -> None:
        """Gives a new token's text out, and ends the sequence where it is its last."""
        notes = () if note is None else (note,)
        sequence.ids.append(token)
        sequence.num_generated += 1
        is_last = sequence.num_generated >= sequence.request.max_tokens
        for piece in pieces_of(token, sequence.text, self._eos_ids, notes, is_last=is_last):
            self._give(sequence, piece)
            if piece.finish_reason is not None:
                self._end(sequence)

    def _end(self, sequence: _Sequence) -> None:
        """Forgets a sequence, and its adapter where that was to go."""
        with self._door:
            self._sequences.pop(sequence.name, None)
            if sequence.runs:
                self._fair.leave(sequence.queue)
            else:
                self._fair.remove(sequence.queue, sequence)
            key = sequence.request.adapter
            known = self._adapters.get(key) if key is not None else None
            goes = False
            if known is not None:
                known.users -= 1
                goes = known.leaving is not None and known.users == 0
        if sequence.apart is not None:
            self._lane.finish(sequence.name)
        elif sequence.runs:
            self._batches.finish(sequence.name)
        if goes:
            assert key is not None
            self._let_go(key)

    def _give(self, sequence: _Sequence, item: Piece | BaseException) -> None:
        self._outbox.setdefault(sequence.stream.loop, []).append((sequence.stream, item))

    def _send(self) -> None:
        """Everything that this step gave, in one call of each loop."""
        outbox, self._outbox = self._outbox, {}
        for loop, items in outbox.items():
            with contextlib.suppress(RuntimeError):  # closed in between: nobody listens
                loop.call_soon_threadsafe(_deliver, items)

    def _try(self, adapter: _Adapter) -> None:
        """A token of the adapter without the cache: it must run, and give numbers. Where rows of others cannot be told
        from its own, it is to run apart."""
        key = str(adapter.choice)
        with torch.inference_mode():
            if not adapter.is_apart:
                try:
                    logits = self._beside_base(key, adapter)
                except RowsError:
                    if adapter.virtual_tokens:
                        raise
                    adapter.is_apart = True
            if adapter.is_apart:
                with pausing(_at_once):
                    logits = self._lane.try_one(key, _task(0, adapter.num_tasks), self._outputs)
        if not torch.isfinite(logits).all():
            raise AdapterRefused("what the base gives with it are numbers that are not finite.")

    def _beside_base(self, key: str, adapter: _Adapter) -> Tensor:
        """The scores of a row of the base and the adapter."""
        virtual = adapter.virtual_tokens
        parts = (Part("base", 0, 1, True), Part("adapter", 0, virtual + 1, True))
        rows = PackedRows(
            adapters=(BASE, key),
            lengths=(1, virtual + 1),
            reads=((), _task(0, adapter.num_tasks)),
            kept=(0, 1),
            alone=self._deterministic,
        )
        at = torch.tensor([[0, *range(virtual + 1)]], device=self._base.device)
        inputs = {
            "input_ids": torch.zeros_like(at),
            "position_ids": at,
            "logits_to_keep": torch.tensor([0, virtual + 1], device=at.device),
            "use_cache": False,
            "packed": Packed(parts),
        }
        return self._scores(rows, inputs)

    def _let_go(self, key: str) -> None:
        with self._door:
            known = self._adapters.get(key)
            if known is None or known.users or known.leaving is None:
                return
            del self._adapters[key]
        leaving, own = known.leaving, known.choice
        if not isinstance(own, str):
            leaving.set_result(None)
            return

        def told(done: Future[None]) -> None:
            if (error := done.exception()) is None:
                leaving.set_result(None)
            else:
                leaving.set_exception(error)

        self._slices.submit(lambda: self._model.delete_adapter(own)).add_done_callback(told)


def _task(number: int, num_tasks: int) -> Reads:
    """What methods read of a sequence of that task; nothing where the adapter knows of none."""
    return ((ARGUMENT, number),) if num_tasks else ()


def _reads_of(request: Generation, num: int) -> Reads:
    """What methods read of a request's sequence.

    Raises:
        ValueError: the adapter has tasks, and the request names none of them.
    """
    if num and not (request.task is not None and 0 <= request.task < num):
        raise ValueError(
            f"task: {request.task}; {request.adapter!r} has {num}, numbered from 0, and needs one."
        )
    return _task(request.task or 0, num)


def _at_once() -> None:
    """Stops nowhere."""


def _deliver(items: list[tuple[_Stream, Piece | BaseException]]) -> None:
    for stream, item in items:
        stream.pieces.put_nowait(item)


def _batches_of(model: Any, sizes: Sizes, *, one_by_one: bool) -> ContinuousBatches:
    """The batches of a base, once a packed row of two sequences gave what each gives by itself."""
    before = model.config._attn_implementation
    ids = torch.arange(1, 9, device=model.device) % model.get_input_embeddings().weight.shape[0]
    try:
        with torch.no_grad():
            wanted = model(input_ids=ids[None], use_cache=False).logits[0].float()
            batches = ContinuousBatches(model, sizes, one_by_one=one_by_one)
            given = model(
                input_ids=torch.cat([ids, ids[:4]])[None],
                position_ids=torch.tensor([[*range(8), *range(4)]], device=model.device),
                logits_to_keep=torch.tensor([7, 11], device=model.device),
                use_cache=False,
                packed=Packed((Part("whole", 0, 8, True), Part("begun", 0, 4, True))),
            ).logits[0]
            allowed = (1e-3 if model.dtype == torch.float32 else 0.1) * wanted.abs().max()
            worst = (given.float() - wanted[[7, 3]]).abs().max()
        if not worst <= allowed:
            raise UnfitBase(f"{type(model).__name__} gives other numbers in a packed row, by {worst:.3g}")
    except Exception as error:
        model.set_attn_implementation(before)
        if isinstance(error, UnfitBase):
            raise
        raise UnfitBase(f"{type(model).__name__} does not run in a packed row: {error!r}") from error
    return batches


def sizes_for(
    model: Any, max_context: int, max_sequences: int, max_batch_tokens: int | None, cache_bytes: int | None
) -> Sizes:
    """How large batches and cache are to be: each sequence may fill the context, as far as memory allows."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    page = 16
    if cache_bytes is None:
        cache_bytes = _memory_of(model.device) // 4
    tokens = min(max_sequences * (max_context + 1), max(cache_bytes // token_bytes, 2 * page))
    return Sizes(
        num_blocks=-(-tokens // page),
        page_size=page,
        max_batch_tokens=max_batch_tokens or max(256, max_sequences),
        max_sequences=max_sequences,
    )


def _memory_of(device: torch.device) -> int:
    """Bytes that are free on the device."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_bytes()
