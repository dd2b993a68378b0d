"""QUESTION_ANS: a question, a text, and the span of the text that answers it. A target is an example.

A text that does not fit is read in windows that overlap by a quarter. The loss of a window is the mean of the cross
entropies of the answer's first and last token over the window's tokens, that of an example the mean over its
windows. A window without the answer points to its null token: the tokenizer's `cls`, where it has one, else the
window's last token, the only one that a decoder has read all of the window at.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.errors import DataError
from orchestrator.spec.job import DatasetSpec

from ..rows.outline import IGNORED, Outline
from ..rows.records import hash_of, kind_of, present, text_in
from ..rows.sources import SourceRow
from .encoding import check_offsets, own_positions
from .task import Answering, Batch, Facts, Padded, Task, pad_id

OVERLAP = 4
"""Windows share one of so many parts of their tokens."""
WINDOWS = 1 << 20
"""More than the windows of any row: numbers its sequences within a step."""
_HIDDEN = float("-inf")


@dataclass(frozen=True, slots=True)
class Record:
    """One row's content; each answer is (text, first character)."""

    where: str
    row_hash: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Window:
    """What is read at once. `spans[i]` are the characters of the context that token i stands for; None of other
    tokens. `first` and `last` are the answer's tokens, or both the null token."""

    ids: list[int]
    types: list[int] | None
    spans: list[tuple[int, int] | None]
    first: int
    last: int
    null: int


@dataclass(frozen=True, slots=True)
class Asked:
    """One rendered row."""

    windows: tuple[Window, ...]
    context: str
    wanted: tuple[str, ...]
    """Texts that are right; none: the text does not answer."""
    row_hash: str
    where: str = ""
    full_length: int = 0
    task_id: int = 0

    @property
    def input_ids(self) -> list[int]:
        """The tokens of all its windows."""
        return [token for window in self.windows for token in window.ids]

    @property
    def num_targets(self) -> int:
        """The example itself, where its question leaves room for the text."""
        return int(bool(self.windows))

    @property
    def is_truncated(self) -> bool:
        """Whether it is read in several windows, or not at all."""
        return len(self.windows) != 1

    def outline(self) -> Outline:
        """The window that has the answer, marked, and the answers."""
        shown = next((w for w in self.windows if w.first != w.null), self.windows[0])
        marked = shown.first != shown.null
        trained = [marked and shown.first <= i <= shown.last for i in range(len(shown.ids))]
        several = f", {len(self.windows)} windows" if len(self.windows) > 1 else ""
        return Outline(shown.ids, trained, f"answers {list(self.wanted)}{several}")


class QuestionAnswering(Task):
    """The first and the last token of the answer."""

    name = "QUESTION_ANS"

    @classmethod
    def read(cls, row: SourceRow, dataset: DatasetSpec) -> Record:
        question = text_in(row, "question", dataset.field_question, dataset)
        context = text_in(row, "context", dataset.field_context, dataset)
        answers = tuple(_answers(row, dataset, context))
        return Record(row.where, hash_of("qa", [question, context, answers]), question, context, answers)

    @classmethod
    def render(cls, records: Iterable[Record], tokenizer: Any, sequence_len: int) -> Iterator[Asked]:
        check_offsets(tokenizer, "qa")
        for record in records:
            yield _rendered(record, tokenizer, sequence_len)

    @classmethod
    def facts(cls, rows: Sequence[Asked]) -> Facts:
        return Facts(may_be_empty=any(not row.wanted for row in rows))

    def collate(self, rows: Sequence[Asked], samples: Sequence[int]) -> Batch:
        windows = [(i, window) for i, row in enumerate(rows) for window in row.windows]
        padded = Padded(pad_id(self.tokenizer), [w.ids for _, w in windows], [w.types for _, w in windows])
        owners = [rows[i] for i, _ in windows]
        numbers = [n for row in rows for n in range(len(row.windows))]
        return Batch(
            {**padded.inputs(), **self.task_ids(owners)},
            {
                "first": torch.tensor([window.first for _, window in windows]),
                "last": torch.tensor([window.last for _, window in windows]),
                "windows": torch.tensor([len(row.windows) for row in owners]),
            },
            [samples[i] * WINDOWS + number for (i, _), number in zip(windows, numbers, strict=True)],
            sum(row.num_targets for row in rows),
        )

    def silent(self, row: Asked) -> Batch:
        return super().silent(replace(row, windows=row.windows[:1]))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        mask = batch.inputs["attention_mask"].bool()
        out = model(**batch.inputs)
        losses = [
            F.cross_entropy(_own(logits, mask), batch.labels[name], ignore_index=IGNORED, reduction="none")
            for logits, name in ((out.start_logits, "first"), (out.end_logits, "last"))
        ]
        return ((losses[0] + losses[1]) / 2 / batch.labels["windows"].abs()).sum()

    def answers(self, model: nn.Module, rows: Sequence[Asked], how: Answering) -> list[str]:
        batch = self.collate(rows, range(len(rows))).to(how.device)
        with torch.no_grad():
            out = model(**batch.inputs)
        mask = batch.inputs["attention_mask"].bool()
        firsts, lasts = _own(out.start_logits, mask).cpu(), _own(out.end_logits, mask).cpu()
        given, at = [], 0
        for row in rows:
            number = len(row.windows)
            scores = zip(firsts[at : at + number], lasts[at : at + number], strict=True)
            given.append(self._best(row, list(scores), how.max_new_tokens))
            at += number
        return given

    def _best(self, row: Asked, scores: list[tuple[Tensor, Tensor]], longest: int) -> str:
        """The span with the largest sum of its ends' values over all windows; none where the null tokens have
        more and the data knows questions without an answer."""
        best, text, nothing = _HIDDEN, "", float("inf")
        for window, (first, last) in zip(row.windows, scores, strict=True):
            in_context = torch.tensor([span is not None for span in window.spans])
            length = len(window.spans)
            table = first[:length, None] + last[None, :length]
            allowed = in_context[:, None] & in_context[None, :]
            allowed &= torch.ones(length, length, dtype=torch.bool).triu().tril(longest - 1)
            allowed[window.null, window.null] = False  # it says that nothing here answers
            table = table.masked_fill(~allowed, _HIDDEN)
            place = int(table.argmax())
            value, begin, end = float(table.flatten()[place]), *divmod(place, length)
            nothing = min(nothing, float(first[window.null] + last[window.null]))
            spans = window.spans[begin], window.spans[end]
            if value > best and spans[0] is not None and spans[1] is not None:
                best, text = value, row.context[spans[0][0] : spans[1][1]]
        return "" if self.known.may_be_empty and nothing > best else text.strip()

    def metrics(
        self, rows: Sequence[Asked], answers: Sequence[str], names: Sequence[str]
    ) -> dict[str, float]:
        measures: dict[str, Callable[[str, str], float]] = {"exact_match": exact, "f1": overlap}
        found = {}
        for name in names:
            best = [
                max(measures[name](answer, right) for right in row.wanted or ("",))
                for row, answer in zip(rows, answers, strict=True)
            ]
            found[name] = sum(best) / len(best)
        return found


def _own(logits: Tensor, mask: Tensor) -> Tensor:
    """(B, T) in float32 without virtual tokens, padding never chosen."""
    return own_positions(logits, mask.shape[1]).float().masked_fill(~mask, _HIDDEN)


# ---- SQuAD's comparison of answers (Rajpurkar et al., arXiv 1606.05250): case, punctuation, articles aside


def plain(text: str) -> str:
    """`text` as SQuAD compares it."""
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(given: str, right: str) -> float:
    """1 where both are the same."""
    return float(plain(given) == plain(right))


def overlap(given: str, right: str) -> float:
    """F1 over the words that both have."""
    ours, theirs = plain(given).split(), plain(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    if not same:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


# ---- rows


def _rendered(record: Record, tokenizer: Any, sequence_len: int) -> Asked:
    question = tokenizer(record.question, add_special_tokens=False, verbose=False)["input_ids"]
    beside = len(question) + tokenizer.num_special_tokens_to_add(pair=True)
    room = sequence_len - beside
    wanted = tuple(dict.fromkeys(text for text, _ in record.answers))
    whole = len(tokenizer(record.question, record.context, verbose=False)["input_ids"])
    windows: tuple[Window, ...] = ()
    if room >= OVERLAP:
        found = tokenizer(
            record.question,
            record.context,
            truncation="only_second",
            max_length=sequence_len,
            stride=room // OVERLAP,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        windows = tuple(
            _window(found, number, record, tokenizer) for number in range(len(found["input_ids"]))
        )
    return Asked(windows, record.context, wanted, record.row_hash, record.where, whole)


def _window(found: Any, number: int, record: Record, tokenizer: Any) -> Window:
    ids, sides = found["input_ids"][number], found.sequence_ids(number)
    offsets = found["offset_mapping"][number]
    spans = [(start, end) if side == 1 else None for side, (start, end) in zip(sides, offsets, strict=True)]
    null = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else len(ids) - 1
    first = last = null
    if record.answers:
        text, begin = record.answers[0]
        first, last = _tokens_of(spans, begin, begin + len(text)) or (null, null)
    types = found["token_type_ids"][number] if "token_type_ids" in found else None
    return Window(ids, types, spans, first, last, null)


def _tokens_of(spans: list[tuple[int, int] | None], begin: int, end: int) -> tuple[int, int] | None:
    """The first and the last token of the characters [begin, end); None where the window lacks some of them."""
    inside = [i for i, span in enumerate(spans) if span and span[0] < end and span[1] > begin]
    if not inside:
        return None
    opening, closing = spans[inside[0]], spans[inside[-1]]
    if opening is None or closing is None or opening[0] > begin or closing[1] < end:
        return None
    return inside[0], inside[-1]


def _answers(row: SourceRow, dataset: DatasetSpec, context: str) -> Iterator[tuple[str, int]]:
    """SQuAD's `{"text": [...], "answer_start": [...]}`, a list of texts or of `{"text", "answer_start"}`, or one
    text; empty where the context does not answer."""
    name = present(row, "answers", dataset.field_answers or "answers", dataset)
    value = row.values[name]
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        value = parsed if isinstance(parsed, list | dict) else value
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        texts = [texts] if isinstance(texts, str) else texts
        starts = [starts] if isinstance(starts, int) else starts
        if not isinstance(texts, list | tuple) or (starts is not None and len(starts) != len(texts)):
            raise _malformed(name, "has no texts with as many starts", row.where)
        pairs = list(zip(texts, starts or [None] * len(texts), strict=True))
    else:
        listed = [] if value in (None, "") else [value] if isinstance(value, str) else value
        if not isinstance(listed, list | tuple):
            raise _malformed(name, f"holds {kind_of(value)}", row.where)
        pairs = [(e.get("text"), e.get("answer_start")) if isinstance(e, dict) else (e, None) for e in listed]
    for text, start in pairs:
        if not isinstance(text, str) or not (start is None or isinstance(start, int)):
            raise _malformed(name, f"holds an answer whose text is {kind_of(text)}", row.where)
        if text.strip():
            yield text, _place(text, start, context, name, row.where)


def _place(text: str, start: int | None, context: str, name: str, where: str) -> int:
    place = context.find(text) if start is None else start
    if place < 0 or context[place : place + len(text)] != text:
        at = "" if start is None else f" at character {start}"
        raise DataError(
            f"the answer {text[:60]!r} of column {name!r} does not stand in the context{at}.",
            where=where,
            hint="An answer is a part of the context, letter by letter; answer_start counts characters from 0.",
        )
    return place


def _malformed(name: str, problem: str, where: str) -> DataError:
    return DataError(
        f"column {name!r} {problem}.",
        where=where,
        hint='Write {"text": ["..."], "answer_start": [0]} as SQuAD does, a list of texts, or [] for no answer.',
    )
