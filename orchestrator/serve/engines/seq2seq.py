"""An engine of an encoder with a decoder: texts of any adapters are read and written in batches that others join at
any step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orchestrator.train.tasks.task import Padded
from peft_dist.prompts.packed import num_virtual

from .decoding_batch import DecodingBatch
from .engine import AdapterRefused, Generation, Piece, ScoresNotFinite, TokenLogprob
from .pieces import pieces_of
from .sampling import Sampler, likeliest_of, logprob_of
from .servable import check_placed, put_on
from .task_engine import Asked, TaskEngine
from .text import TextStream

TASK = "SEQ_2_SEQ_LM"

_AT_ONCE = 8
"""Batches that are written side by side, where they cannot join; more wait."""


@dataclass(eq=False)
class _Written(Asked):
    """One text on its way."""

    request: Generation = field(kw_only=True)
    text: TextStream = field(kw_only=True)
    sampler: Sampler | None = None
    written: list[int] = field(default_factory=list)
    """What the decoder has, from its start on."""
    is_done: bool = False


class Seq2SeqEngine(TaskEngine):
    """See `engine.Engine`. What came while others are written begins with the next token, and goes with them from
    then on where the base and its virtual tokens let it; else beside them, in a batch of its own.

    Args:
        model: the base, on its device.
        decode: token ids to text, without special tokens.
        eos_ids: the tokens that end a text.
        max_context: tokens of what is read and what is written together.
        options: of `TaskEngine`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decode: Callable[[Sequence[int]], str],
        eos_ids: frozenset[int],
        max_context: int,
        **options: Any,
    ) -> None:
        self._decode, self._eos_ids, self._max_context = decode, eos_ids, max_context
        config: Any = model.generation_config
        # A text that reaches `max_tokens` ends there, as any; it is not made to end with its end.
        config.forced_eos_token_id = None
        self._pad = next(
            (
                int(token)
                for token in (config.pad_token_id, model.config.pad_token_id, *sorted(eos_ids))
                if token is not None
            ),
            0,
        )
        self._start = self._starts_with(config, model.config)
        self._batches: list[DecodingBatch] = []
        super().__init__(model, TASK, **options)

    @property
    def task(self) -> str:
        """What its base is loaded for."""
        return TASK

    @property
    def max_context(self) -> int:
        """See `Engine.max_context`."""
        return self._max_context

    async def generate(self, request: Generation) -> AsyncGenerator[Piece, None]:
        """See `Engine.generate`."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

        def tell(item: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, item)

        with self._using(request.adapter):
            asked = _Written(
                request.adapter,
                request.queue or request.adapter or "",
                request.prompt_ids,
                tell,
                request.task,
                request=request,
                text=TextStream(self._decode, request.stop),
            )
            self._ask([asked])
            try:
                while True:
                    piece = await pieces.get()
                    if isinstance(piece, BaseException):
                        raise piece
                    yield piece
                    if piece.finish_reason is not None:
                        return
            finally:
                asked.is_left = True

    # --- in the engine's thread

    def _answer(self, batch: list[Asked]) -> None:
        self._begin(batch)
        while self._batches and self._dead is None:
            self._began = time.monotonic()
            for each in list(self._batches):
                self._step(each)
            self._merge()
            self._take_turns()
            # After it: who is gone was its adapter's last user.
            self._sweep()
            if len(self._batches) < _AT_ONCE and (newcomers := self._next_batch()):
                self._begin(newcomers)

    def _run(self, asked: list[Asked]) -> None:
        """Rows whose adapters bring the same kind and number of virtual tokens begin."""
        rows: list[Any] = list(asked)
        for row in rows:
            row.sampler = Sampler(self._base, row.request, self._eos_ids, num_before=1)
            row.written = [self._start]
        self._batches.append(self._batch_of(rows))

    def _batch_of(self, rows: Sequence[Asked]) -> DecodingBatch:
        padded = Padded(self._pad, [list(row.ids) for row in rows]).inputs()
        return DecodingBatch(
            self._model,
            rows,
            [row.adapter for row in rows],
            {name: tensor.to(self._base.device) for name, tensor in padded.items()},
            self._task_ids(rows),
            self._start,
            joins=not self._one_by_one,
        )

    def _begin(self, asked: list[Asked]) -> None:
        """Lets rows begin beside those that are written; those that cannot are told."""
        here = [row for row in asked if not row.is_left]
        self._gone([row for row in asked if row.is_left])
        for bucket in self._buckets(here):
            try:
                self._run(bucket)
            except Exception as error:
                self._fail(bucket, error)

    def _step(self, batch: DecodingBatch) -> None:
        """A token of each of its rows. Where it fails, its rows do, and others go on."""
        try:
            with torch.inference_mode():
                scores = batch.step()
                tokens = [
                    self._token(row, own, token)
                    for row, own, token in zip(batch.rows, scores, likeliest_of(scores), strict=True)
                ]
                batch.take(tokens)
        except Exception as error:
            self._batches.remove(batch)
            self._fail(batch.rows, error)
            return
        with self._changed:
            for row in batch.rows:
                self._fair.served(row.queue, 1)
        self._keep_running(batch)

    def _token(self, row: Any, scores: Tensor, token: int | None) -> int:
        """Chooses a row's next token and gives it out; ends a row whose scores are no numbers."""
        if token is not None and not row.sampler.takes_the_likeliest:
            token = row.sampler.choose(scores, row.written)
        if token is None:
            row.is_done = True
            row.tell(ScoresNotFinite())
            return 0
        notes: tuple[TokenLogprob, ...] = ()
        if row.request.logprobs is not None:
            notes = (logprob_of(scores.log_softmax(-1), token, row.request.logprobs),)
        row.written.append(token)
        is_last = len(row.written) > row.request.max_tokens
        for piece in pieces_of(token, row.text, self._eos_ids, notes, is_last=is_last):
            row.is_done = piece.finish_reason is not None
            row.tell(piece)
        return token

    def _sweep(self) -> None:
        """Lets go of rows for which nobody waits any more."""
        for batch in list(self._batches):
            self._keep_running(batch)

    def _keep_running(self, batch: DecodingBatch) -> None:
        places = [place for place, row in enumerate(batch.rows) if not row.is_done and not row.is_left]
        if len(places) == len(batch.rows):
            return
        self._gone([row for row in batch.rows if row.is_done or row.is_left])
        if not places:
            self._batches.remove(batch)
            return
        with torch.inference_mode():
            batch.keep(places)

    def _merge(self) -> None:
        """Lets batches that can go together."""
        joined: list[DecodingBatch] = []
        for batch in self._batches:
            into = next((each for each in joined if each.can_join(batch)), None)
            if into is None:
                joined.append(batch)
                continue
            with torch.inference_mode():
                into.join(batch)
        self._batches = joined

    def _fail(self, rows: Sequence[Asked], error: Exception) -> None:
        for row in rows:
            row.tell(error)
        self._gone(rows)

    def _gone(self, rows: Sequence[Asked]) -> None:
        with self._changed:
            for row in rows:
                self._fair.leave(row.queue)
            names = {id(row) for row in rows}
            self._running = [row for row in self._running if id(row) not in names]

    def _put_on(self, adapter: str, saved: Any, directory: Path) -> int:
        put_on(self._model, saved, adapter)
        try:
            check_placed(self._model, adapter)
            self._model.eval()
            virtual = num_virtual(self._model, adapter)
            self._try(adapter)
        except BaseException:
            self._model.delete_adapter(adapter)
            raise
        return virtual

    def _try(self, adapter: str) -> None:
        """A token of the adapter: it must run, and give numbers."""
        row = Asked(adapter, "", [self._pad, self._pad], _nobody)
        with torch.inference_mode():
            scores = self._batch_of([row]).step()
        if not torch.isfinite(scores).all():
            raise AdapterRefused("what the base gives with it are numbers that are not finite.")

    @staticmethod
    def _starts_with(generation: Any, config: Any) -> int:
        said = (
            generation.decoder_start_token_id,
            getattr(config, "decoder_start_token_id", None),
            generation.bos_token_id,
            getattr(config, "bos_token_id", None),
        )
        for token in said:
            if token is not None:
                return int(token[0] if isinstance(token, (list, tuple)) else token)
        raise ValueError(
            "the base does not say with which token its decoder begins: decoder_start_token_id is missing from its "
            "generation_config.json."
        )


def _nobody(result: Any) -> None:
    return None
