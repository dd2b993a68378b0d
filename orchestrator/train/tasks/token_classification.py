"""TOKEN_CLS: words and their tags (BIO). A target is a word: its first token is trained, the others are not.

Entities are compared as CoNLL does it, by seqeval: one counts where its words and its kind are right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.errors import DataError
from orchestrator.spec.job import DatasetSpec
from peft_dist.lazy import lazy

from ..rows.chunks import chunks
from ..rows.outline import IGNORED, Outline
from ..rows.records import hash_of, kind_of, present
from ..rows.sources import SourceRow
from .classification import unknown_label
from .encoding import check_offsets, own_positions
from .task import Answering, Batch, Facts, Padded, Task, measured, pad_id, right_padded

seqeval = lazy("seqeval.metrics")
OUTSIDE = "O"


@dataclass(frozen=True, slots=True)
class Record:
    """One row's content."""

    where: str
    row_hash: str
    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tagged:
    """One rendered row. `firsts[i]` is the place of the first token of word i; None where it was cut off."""

    input_ids: list[int]
    firsts: list[int | None]
    tags: tuple[str, ...]
    row_hash: str
    where: str = ""
    full_length: int = 0
    task_id: int = 0

    @property
    def num_targets(self) -> int:
        """Words that are still there."""
        return sum(first is not None for first in self.firsts)

    @property
    def is_truncated(self) -> bool:
        """Whether tokens were cut off."""
        return self.full_length > len(self.input_ids)

    def outline(self) -> Outline:
        """Its tokens, first ones marked, and its tags."""
        trained = [place in set(self.firsts) for place in range(len(self.input_ids))]
        return Outline(self.input_ids, trained, f"tags {' '.join(self.tags)}")


class TokenClassification(Task):
    """Cross entropy over the tags of each word's first token."""

    name = "TOKEN_CLS"
    has_labels = True

    @classmethod
    def read(cls, row: SourceRow, dataset: DatasetSpec) -> Record:
        words = _texts(row, "tokens", dataset.field_tokens, dataset)
        tags = _texts(row, "tags", dataset.field_tags, dataset)
        if len(words) != len(tags):
            raise DataError(f"has {len(words)} tokens and {len(tags)} tags.", where=row.where)
        return Record(row.where, hash_of("token-classification", [words, tags]), words, tags)

    @classmethod
    def render(cls, records: Iterable[Record], tokenizer: Any, sequence_len: int) -> Iterator[Tagged]:
        check_offsets(tokenizer, "token-classification")
        for batch in chunks(records):
            texts = [" ".join(record.words) for record in batch]
            found = tokenizer(texts, return_offsets_mapping=True, verbose=False)
            for record, ids, offsets in zip(batch, found["input_ids"], found["offset_mapping"], strict=True):
                firsts = [
                    place if place is not None and place < sequence_len else None
                    for place in first_tokens(record.words, offsets)
                ]
                yield Tagged(ids[:sequence_len], firsts, record.tags, record.row_hash, record.where, len(ids))

    @classmethod
    def facts(cls, rows: Sequence[Tagged]) -> Facts:
        return Facts(labels=tuple(sorted({tag for row in rows for tag in row.tags})))

    def check(self, rows: Sequence[Tagged]) -> None:
        for row in rows:
            for tag in row.tags:
                if tag not in self.known.labels:
                    raise unknown_label(tag, row.where, self.known.labels, "tag")

    def collate(self, rows: Sequence[Tagged], samples: Sequence[int]) -> Batch:
        number = {tag: place for place, tag in enumerate(self.known.labels)}
        labels = []
        for row in rows:
            own = [IGNORED] * len(row.input_ids)
            for first, tag in zip(row.firsts, row.tags, strict=True):
                if first is not None:
                    own[first] = number[tag]
            labels.append(own)
        padded = Padded(pad_id(self.tokenizer), [row.input_ids for row in rows])
        inputs = {**padded.inputs(), **self.task_ids(rows)}
        targets = sum(row.num_targets for row in rows)
        return Batch(inputs, {"labels": right_padded(labels, IGNORED)}, list(samples), targets)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        labels = batch.labels["labels"]
        logits = own_positions(model(**batch.inputs).logits, labels.shape[1])
        is_target = labels != IGNORED
        if not is_target.any():
            return logits.float().sum() * 0.0
        return F.cross_entropy(logits[is_target].float(), labels[is_target], reduction="sum")

    def answers(self, model: nn.Module, rows: Sequence[Tagged], how: Answering) -> list[list[str]]:
        batch = self.collate(rows, range(len(rows))).to(how.device)
        with torch.no_grad():
            logits = model(**batch.inputs).logits
        chosen = own_positions(logits, batch.inputs["input_ids"].shape[1]).argmax(dim=-1).tolist()
        return [
            [OUTSIDE if first is None else self.known.labels[tags[first]] for first in row.firsts]
            for row, tags in zip(rows, chosen, strict=True)
        ]

    def metrics(
        self, rows: Sequence[Tagged], answers: Sequence[list[str]], names: Sequence[str]
    ) -> dict[str, float]:
        wanted, given = [list(row.tags) for row in rows], list(answers)
        measures = {
            "precision": lambda: seqeval.precision_score(wanted, given, zero_division=0),
            "recall": lambda: seqeval.recall_score(wanted, given, zero_division=0),
            "f1": lambda: seqeval.f1_score(wanted, given, zero_division=0),
            "accuracy": lambda: seqeval.accuracy_score(wanted, given),
        }
        return measured(measures, names)


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """For each word of `" ".join(words)`, the place of the first token that holds one of its characters and none
    of the word before; None where there is none.

    Args:
        offsets: each token's first character and the one after its last; (0, 0) for special tokens.
    """
    found: list[int | None] = []
    token, start = 0, 0
    for word in words:
        end = start + len(word)
        while token < len(offsets) and (offsets[token][1] <= start or offsets[token][0] == offsets[token][1]):
            token += 1
        has_one = token < len(offsets) and offsets[token][0] < end and word != ""
        found.append(token if has_one else None)
        token += has_one
        start = end + 1
    return found


def _texts(row: SourceRow, role: str, override: str | None, dataset: DatasetSpec) -> tuple[str, ...]:
    name = present(row, role, override or role, dataset)
    value = row.values[name]
    if isinstance(value, str):  # CSV has no lists
        try:
            value = json.loads(value)
        except ValueError:
            value = value.split()
    if not isinstance(value, list | tuple):
        raise DataError(
            f"column {name!r} holds {kind_of(value)}; it must be a list of texts.", where=row.where
        )
    for number, each in enumerate(value, start=1):
        if not isinstance(each, str):
            raise DataError(
                f"entry {number} of column {name!r} is {kind_of(each)}; it must be a text.",
                where=row.where,
                hint="Write tags by name, such as B-PER and O." if role == "tags" else None,
            )
    return tuple(value)
