"""Task heads of one base: labels, entities, answers and vectors of texts by adapters of any method in one batch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orchestrator.train.task_file import read_task_file
from orchestrator.train.tasks.embedding import embeddings
from orchestrator.train.tasks.encoding import check_offsets, encode, own_positions
from orchestrator.train.tasks.qa import Asked as Question
from orchestrator.train.tasks.qa import QuestionAnswering, Window
from orchestrator.train.tasks.qa import Record as QuestionRecord
from orchestrator.train.tasks.task import Padded, pad_id
from peft_dist.prompts.packed import num_virtual
from peft_dist.rows import BASE, Rows

from . import head_answers, own_head
from .engine import AdapterRefused
from .heads import TERMS, Classified, Embedded, Found, HeadTask, Input, NoTokens, Tagged, Terms, TooLong
from .own_head import OwnHead, Tap
from .servable import check_placed, put_on
from .task_engine import Asked, TaskEngine

T = TypeVar("T")


@dataclass(eq=False)
class _Row(Asked):
    """A row with the kinds of its tokens, where the tokenizer tells two texts apart."""

    types: Sequence[int] | None = None


@dataclass(frozen=True)
class _Values:
    """What a row came to: its head's values or its vector, in float32 on the CPU, and its adapter's head."""

    tensor: Tensor
    head: OwnHead | None


class HeadEngine(TaskEngine):
    """See `heads.Heads`. The base runs once for the rows of all adapters; each adapter's own head then reads its rows.

    Args:
        model: the base with the head of the task, on its device.
        tokenizer: the base's.
        max_context: tokens of a text, special ones included.
        options: of `TaskEngine`.

    Raises:
        AdapterRefused: a base whose head has no known name.
        ModelError: a tokenizer that cannot say where in a text a token stands, where the task needs it.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, task: HeadTask, max_context: int, **options: Any
    ) -> None:
        self._tokenizer, self._max_context = tokenizer, max_context
        self._tokenizing = threading.Lock()
        self._name = own_head.name_of_head(model, task)
        if task in ("TOKEN_CLS", "QUESTION_ANS"):
            check_offsets(tokenizer, task)
        config: Any = model.config
        if config.pad_token_id is None:
            config.pad_token_id = pad_id(tokenizer)
        self._fresh: frozenset[str] = getattr(model, "begun_anew", frozenset())
        self._own: dict[str | None, OwnHead] = {}
        self._original: Any = None
        self._tap = Tap(0)
        if self._name is not None:
            self._original = getattr(model, self._name)
            self._tap = Tap(2 if task == "QUESTION_ANS" else config.num_labels)
            setattr(model, self._name, self._tap)
            if not self._fresh:
                named = own_head.label_names((), config, config.num_labels, "the base")
                self._own[None] = OwnHead(self._original, named, may_be_empty=True)
        self._head_task: HeadTask = task
        super().__init__(model, task, **options)

    @property
    def task(self) -> HeadTask:
        """See `Heads.task`."""
        return self._head_task

    # --- what is asked

    async def embed(
        self, inputs: Sequence[Input], adapter: str | None, terms: Terms = TERMS
    ) -> list[Embedded]:
        """See `Heads.embed`."""
        with self._using(adapter):
            rows = await self._texts(inputs, adapter, terms)
            return [
                Embedded(tuple(values.tensor.tolist()), len(row.ids))
                for row, values in zip(rows, await self._answers(rows), strict=True)
            ]

    async def classify(
        self, inputs: Sequence[Input], adapter: str | None, terms: Terms = TERMS
    ) -> list[Classified]:
        """See `Heads.classify`."""
        with self._using(adapter):
            rows = await self._texts(inputs, adapter, terms)
            return [
                Classified(head_answers.classes(values.tensor, _labels(values)), len(row.ids))
                for row, values in zip(rows, await self._answers(rows), strict=True)
            ]

    async def tag(self, inputs: Sequence[Input], adapter: str | None, terms: Terms = TERMS) -> list[Tagged]:
        """See `Heads.tag`: words are what blanks separate, as in the rows of training."""
        with self._using(adapter):
            words = [head_answers.Words.of(each.text) for each in inputs]
            found = await self._in_turn(
                self._tokenizer,
                [each.joined or " " for each in words],
                return_offsets_mapping=True,
                verbose=False,
            )
            rows = self._rows(found["input_ids"], [None] * len(inputs), adapter, terms)
            answers = await self._answers(rows)
            return [
                Tagged(
                    head_answers.entities(values.tensor, _labels(values), own.firsts(offsets), own),
                    len(row.ids),
                )
                for row, values, own, offsets in zip(
                    rows, answers, words, found["offset_mapping"], strict=True
                )
            ]

    async def find(
        self, questions: Sequence[tuple[str, str]], adapter: str | None, top: int, terms: Terms = TERMS
    ) -> list[Found]:
        """See `Heads.find`: a context that does not fit is read in windows that overlap, as in training."""
        with self._using(adapter):
            self._check_head(adapter)
            limit = self._max_context - self.virtual_tokens(adapter)
            asked = await self._in_turn(self._rendered, questions, limit)
            for index, each in enumerate(asked):
                if not each.windows:
                    raise TooLong(index, each.full_length, limit)
            windows = [window for each in asked for window in each.windows]
            rows = self._rows([w.ids for w in windows], [w.types for w in windows], adapter, terms)
            answers = await self._answers(rows)
            return await asyncio.to_thread(_found, asked, answers, top)

    # --- from texts to rows

    async def _in_turn(self, run: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Runs it in a thread, one at a time: a tokenizer keeps what it was last told of lengths."""

        def alone() -> T:
            with self._tokenizing:
                return run(*args, **kwargs)

        return await asyncio.to_thread(alone)

    async def _texts(self, inputs: Sequence[Input], adapter: str | None, terms: Terms) -> list[_Row]:
        encoded = await self._in_turn(self._encoded, inputs)
        return self._rows([ids for ids, _ in encoded], [types for _, types in encoded], adapter, terms)

    def _encoded(self, inputs: Sequence[Input]) -> list[tuple[Sequence[int], Sequence[int] | None]]:
        found: list[tuple[Sequence[int], Sequence[int] | None]] = [([], None)] * len(inputs)
        for is_pair in (False, True):
            at = [
                i for i, each in enumerate(inputs) if each.ids is None and (each.pair is not None) == is_pair
            ]
            if not at:
                continue
            pairs = [inputs[i].pair or "" for i in at] if is_pair else None
            whole = encode(self._tokenizer, [inputs[i].text for i in at], pairs, 1 << 40)
            for i, each in zip(at, whole, strict=True):
                found[i] = (each.ids, each.types)
        return [
            own if each.ids is None else (list(each.ids), None)
            for own, each in zip(found, inputs, strict=True)
        ]

    def _rendered(self, questions: Sequence[tuple[str, str]], limit: int) -> list[Question]:
        records = [QuestionRecord("", "", question, context, ()) for question, context in questions]
        return list(QuestionAnswering.render(records, self._tokenizer, limit))

    def _rows(
        self,
        ids: Sequence[Sequence[int]],
        types: Sequence[Sequence[int] | None],
        adapter: str | None,
        terms: Terms,
    ) -> list[_Row]:
        self._check_head(adapter)
        limit = self._max_context - self.virtual_tokens(adapter)
        for index, own in enumerate(ids):
            if not own:
                raise NoTokens(index)
            if len(own) > limit:
                raise TooLong(index, len(own), limit)
        return [
            _Row(adapter, terms.queue or adapter or "", own, _nobody, terms.task, types=kinds)
            for own, kinds in zip(ids, types, strict=True)
        ]

    def _check_head(self, adapter: str | None) -> None:
        if self._name is not None and adapter is None and None not in self._own:
            raise AdapterRefused(
                f"the base itself has no trained head for {self._head_task}: name one of the adapters as the model."
            )

    async def _answers(self, rows: Sequence[_Row]) -> list[_Values]:
        """What each row comes to."""
        loop = asyncio.get_running_loop()
        waits = []
        for row in rows:
            future: asyncio.Future[_Values] = loop.create_future()
            row.tell = _teller(loop, future)
            waits.append(future)
        try:
            self._ask(rows)
            return await asyncio.gather(*waits)
        finally:
            for row, future in zip(rows, waits, strict=True):
                row.is_left = True
                if future.done() and not future.cancelled():
                    future.exception()

    # --- in the engine's thread

    def _run(self, asked: list[Asked]) -> None:
        for row, values in zip(asked, self._forward(asked), strict=True):
            row.tell(values)

    def _forward(self, asked: Sequence[Asked]) -> list[_Values]:
        rows: list[Any] = list(asked)
        adapters = [row.adapter for row in rows]
        types = [row.types for row in rows]
        if any(each is not None for each in types):
            types = [
                each if each is not None else [0] * len(row.ids)
                for row, each in zip(rows, types, strict=True)
            ]
        padded = Padded(pad_id(self._tokenizer), [list(row.ids) for row in rows], types).inputs()
        inputs = {name: tensor.to(self._base.device) for name, tensor in padded.items()}
        inputs |= self._task_ids(rows)
        with self._model.using(Rows(adapters=tuple(adapter or BASE for adapter in adapters))):
            if self._name is None:
                vectors = embeddings(self._model, inputs).cpu()
                return [_Values(vector, None) for vector in vectors]
            self._tap.seen = None
            self._model(**inputs)
        hidden, self._tap.seen = self._tap.seen, None
        assert hidden is not None, "the base did not ask its head"
        return self._by_heads(self._line_up(hidden, inputs["attention_mask"]), rows)

    def _line_up(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """What the head reads of each row, without virtual tokens: of a decoder that classifies, its last token."""
        if self._head_task != "SEQ_CLS":
            return own_positions(hidden, mask.shape[1])
        if hidden.ndim == 3 and self._name == "score":
            last = mask.sum(dim=1) - 1
            return own_positions(hidden, mask.shape[1])[torch.arange(len(last), device=last.device), last]
        return hidden

    def _by_heads(self, hidden: Tensor, rows: Sequence[Any]) -> list[_Values]:
        values: dict[int, _Values] = {}
        for adapter in dict.fromkeys(row.adapter for row in rows):
            at = [i for i, row in enumerate(rows) if row.adapter == adapter]
            head = self._own[adapter]
            for i, logits in zip(at, head.logits(hidden[at]).cpu(), strict=True):
                own = logits if self._head_task == "SEQ_CLS" else logits[: len(rows[i].ids)]
                values[i] = _Values(own, head)
        return [values[i] for i in range(len(rows))]

    def _put_on(self, adapter: str, saved: Any, directory: Path) -> int:
        others, tensors = own_head.split(saved, self._name)
        own_head.check_brought(self._fresh, saved.tensors)
        put_on(self._model, others, adapter)
        try:
            check_placed(self._model, adapter)
            self._model.eval()
            if self._name is not None:
                self._own[adapter] = self._head_of(tensors, directory)
            virtual = num_virtual(self._model, adapter)
            self._try(adapter)
        except BaseException:
            self._own.pop(adapter, None)
            self._model.delete_adapter(adapter)
            raise
        return virtual

    def _head_of(self, tensors: dict[str, Tensor], directory: Path) -> OwnHead:
        module = own_head.own_module(self._original, tensors) if tensors else self._original
        said = read_task_file(directory)
        config = self._base.config
        num = own_head.num_outputs(module, config.get_text_config().hidden_size)
        labels = () if said is None else said.facts.labels
        named = own_head.label_names(labels, config, num, "its head")
        # What other programs trained may know questions without an answer: SQuAD's second version does.
        return OwnHead(module, named, may_be_empty=said is None or said.facts.may_be_empty)

    def _try(self, adapter: str) -> None:
        """A row of the adapter: it must run, and give numbers."""
        with torch.inference_mode():
            (values,) = self._forward([_Row(adapter, "", self._tokenizer("a")["input_ids"] or [0], _nobody)])
        if not torch.isfinite(values.tensor).all():
            raise AdapterRefused("what the base gives with it are numbers that are not finite.")

    def _take_off(self, adapter: str) -> None:
        super()._take_off(adapter)
        self._own.pop(adapter, None)

    def _check_sum(self, adapters: Sequence[str]) -> None:
        if self._name is not None:
            raise AdapterRefused(
                "each of these adapters has a head of its own, and heads have no weighted sum."
            )


def _nobody(result: Any) -> None:
    return None


def _teller(loop: asyncio.AbstractEventLoop, future: asyncio.Future[_Values]) -> Callable[[Any], None]:
    def deliver(result: Any) -> None:
        if future.done():
            return
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

    def tell(result: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(deliver, result)

    return tell


def _labels(values: _Values) -> tuple[str, ...]:
    assert values.head is not None
    return values.head.labels


def _found(asked: Sequence[Question], answers: Sequence[_Values], top: int) -> list[Found]:
    found, at = [], 0
    for each in asked:
        own: Sequence[Window] = each.windows
        values = answers[at : at + len(own)]
        at += len(own)
        head = values[0].head
        assert head is not None
        pairs = [(value.tensor[:, 0], value.tensor[:, 1]) for value in values]
        spans = head_answers.spans(own, pairs, each.context, top, may_be_empty=head.may_be_empty)
        found.append(Found(spans, sum(len(window.ids) for window in own)))
    return found
