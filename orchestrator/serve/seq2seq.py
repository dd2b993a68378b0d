"""An engine of an encoder with a decoder: texts of any adapters are read as one batch and written token by token."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from peft_dist.prompts.packed import num_virtual
from peft_dist.rows import BASE, Rows

from ..train.tasks.task import Padded
from .engine import AdapterRefused, Generation, Piece, TokenLogprob
from .pieces import pieces_of
from .sampling import generator_of, logprob_of
from .servable import check_placed, put_on
from .task_engine import Asked, TaskEngine
from .text import TextStream

TASK = "SEQ_2_SEQ_LM"


@dataclass(eq=False)
class _Written(Asked):
    """One text on its way."""

    request: Generation = field(kw_only=True)
    text: TextStream = field(kw_only=True)
    generator: torch.Generator | None = None
    num_tokens: int = 0
    is_done: bool = False


class Seq2SeqEngine(TaskEngine):
    """See `engine.Engine`. What came while a batch is written is the next batch.

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

    def _run(self, asked: list[Asked]) -> None:
        rows: list[Any] = list(asked)
        for row in rows:
            row.generator = generator_of(row.request, self._base.device)
        tap = _Tap(rows, self._eos_ids)
        with self._model.using(Rows(adapters=tuple(row.adapter or BASE for row in rows))):
            self._model.generate(
                **self._inputs([list(row.ids) for row in rows]),
                **self._task_ids(rows),
                generation_config=self._config(max(row.request.max_tokens for row in rows)),
                logits_processor=LogitsProcessorList([_Choice(rows, tap)]),
                stopping_criteria=StoppingCriteriaList([tap]),
            )

    def _inputs(self, ids: list[list[int]]) -> dict[str, Tensor]:
        padded = Padded(self._pad, ids).inputs()
        return {name: tensor.to(self._base.device) for name, tensor in padded.items()}

    def _config(self, longest: int) -> GenerationConfig:
        """The base's own defaults (a repetition penalty, n-grams that do not repeat, its end tokens), one text each."""
        config = copy.deepcopy(self._base.generation_config)
        config.update(
            max_new_tokens=longest,
            max_length=None,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(self._eos_ids) or None,
            pad_token_id=self._pad,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
        )
        return config

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
        seen = _Seen()
        row = Asked(adapter, "", [self._pad, self._pad], _nobody)
        with torch.inference_mode(), self._model.using(Rows(adapters=(adapter,))):
            self._model.generate(
                **self._inputs([list(row.ids)]),
                **self._task_ids([row]),
                generation_config=self._config(1),
                logits_processor=LogitsProcessorList([seen]),
            )
        if not seen.is_finite:
            raise AdapterRefused("what the base gives with it are numbers that are not finite.")


def _nobody(result: Any) -> None:
    return None


class _Seen(LogitsProcessor):
    """Whether all scores were numbers."""

    def __init__(self) -> None:
        self.is_finite = True

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The scores, as they are; what a rule of generation forbids is -inf."""
        self.is_finite = self.is_finite and not bool(scores.isnan().any() or (scores == float("inf")).any())
        return scores


class _Choice(LogitsProcessor):
    """Draws the next token of each text that asks for it, and leaves the likeliest of the others."""

    def __init__(self, rows: Sequence[_Written], tap: _Tap) -> None:
        self._rows, self._tap = rows, tap

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (rows, vocabulary); of a drawn token's row only that token is left."""
        chosen = scores
        for number, row in enumerate(self._rows):
            if row.is_done:
                continue
            if row.request.logprobs is not None:
                self._tap.logprobs[number] = scores[number].float().log_softmax(-1)
            if row.generator is None:
                continue
            own: Any = scores[number : number + 1].float()
            own = TemperatureLogitsWarper(float(row.request.temperature))(input_ids, own)
            if row.request.top_p < 1:
                own = TopPLogitsWarper(row.request.top_p)(input_ids, own)
            token = torch.multinomial(own.softmax(-1), 1, generator=row.generator)[0]
            if chosen is scores:
                chosen = scores.clone()  # type: ignore[assignment]
            chosen[number] = float("-inf")
            chosen[number, token] = 0.0
        return chosen


class _Tap(StoppingCriteria):
    """Sees each new token before transformers asks whether to go on; gives texts out and ends them."""

    def __init__(self, rows: Sequence[_Written], eos_ids: frozenset[int]) -> None:
        self._rows, self._eos_ids = rows, eos_ids
        self.logprobs: dict[int, Tensor] = {}

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        """Whether each text is done (rows,)."""
        for number, (row, token) in enumerate(zip(self._rows, input_ids[:, -1].tolist(), strict=True)):
            if not row.is_done:
                self._take(number, row, token)
        return torch.tensor([row.is_done for row in self._rows], device=input_ids.device)

    def _take(self, number: int, row: _Written, token: int) -> None:
        if row.is_left:
            row.is_done = True
            return
        row.num_tokens += 1
        notes = self._noted(number, row, token)
        is_last = row.num_tokens >= row.request.max_tokens
        for piece in pieces_of(token, row.text, self._eos_ids, notes, is_last=is_last):
            row.is_done = piece.finish_reason is not None
            row.tell(piece)

    def _noted(self, number: int, row: _Written, token: int) -> tuple[TokenLogprob, ...]:
        if row.request.logprobs is None:
            return ()
        return (logprob_of(self.logprobs.pop(number), token, row.request.logprobs),)
