"""SEQ_CLS: a text, or a pair of texts, and its label. A target is an example.

The labels are those of the rows, in sorted order (as numbers where all of them are numbers); they stand in the
base's config and beside the adapter. What is classified is the whole text: where the model's head gives a value for
every token (decoders), that of the last token which is no padding counts.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.errors import DataError, closest
from orchestrator.spec.job import DatasetSpec
from peft_dist.lazy import lazy

from ..rows.chunks import chunks
from ..rows.outline import IGNORED, Outline
from ..rows.records import hash_of, present, text_in
from ..rows.sources import SourceRow
from .encoding import encode
from .task import Answering, Batch, Facts, Padded, Task, measured, pad_id

sklearn = lazy("sklearn.metrics")


@dataclass(frozen=True, slots=True)
class Record:
    """One row's content."""

    where: str
    row_hash: str
    text: str
    pair: str | None
    label: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """One rendered row."""

    input_ids: list[int]
    types: list[int] | None
    label: str
    row_hash: str
    where: str = ""
    full_length: int = 0
    task_id: int = 0

    @property
    def num_targets(self) -> int:
        """The example itself."""
        return 1

    @property
    def is_truncated(self) -> bool:
        """Whether tokens were cut off."""
        return self.full_length > len(self.input_ids)

    def outline(self) -> Outline:
        """Its tokens and its label."""
        return Outline(self.input_ids, [False] * len(self.input_ids), f"label {self.label}")


class Classification(Task):
    """Cross entropy over the labels."""

    name = "SEQ_CLS"
    has_labels = True

    @classmethod
    def read(cls, row: SourceRow, dataset: DatasetSpec) -> Record:
        text = text_in(row, "text", dataset.field_text, dataset)
        pair = None
        if dataset.field_text_pair or row.values.get("text_pair") is not None:
            pair = text_in(row, "text_pair", dataset.field_text_pair, dataset)
        label = label_in(row, dataset)
        return Record(row.where, hash_of("classification", [text, pair, label]), text, pair, label)

    @classmethod
    def render(cls, records: Iterable[Record], tokenizer: Any, sequence_len: int) -> Iterator[Labelled]:
        for batch in chunks(records):
            encoded: dict[int, Any] = {}
            for is_pair in (False, True):
                chosen = [i for i, record in enumerate(batch) if (record.pair is not None) == is_pair]
                if not chosen:
                    continue
                pairs = [batch[i].pair or "" for i in chosen] if is_pair else None
                found = encode(tokenizer, [batch[i].text for i in chosen], pairs, sequence_len)
                encoded.update(zip(chosen, found, strict=True))
            for i, record in enumerate(batch):
                own = encoded[i]
                yield Labelled(
                    own.ids, own.types, record.label, record.row_hash, record.where, own.full_length
                )

    @classmethod
    def facts(cls, rows: Sequence[Labelled]) -> Facts:
        return Facts(labels=in_order({row.label for row in rows}))

    def check(self, rows: Sequence[Labelled]) -> None:
        for row in rows:
            if row.label not in self.known.labels:
                raise unknown_label(row.label, row.where, self.known.labels, "label")

    def collate(self, rows: Sequence[Labelled], samples: Sequence[int]) -> Batch:
        padded = Padded(pad_id(self.tokenizer), [r.input_ids for r in rows], [r.types for r in rows])
        labels = torch.tensor([self.known.labels.index(row.label) for row in rows])
        inputs = {**padded.inputs(), **self.task_ids(rows)}
        return Batch(inputs, {"labels": labels}, list(samples), len(rows))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = sequence_logits(model, batch.inputs)
        labels = batch.labels["labels"]
        if not (labels != IGNORED).any():
            return logits.sum() * 0.0
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def answers(self, model: nn.Module, rows: Sequence[Labelled], how: Answering) -> list[str]:
        batch = self.collate(rows, range(len(rows))).to(how.device)
        with torch.no_grad():
            chosen = sequence_logits(model, batch.inputs).argmax(dim=-1).tolist()
        return [self.known.labels[number] for number in chosen]

    def metrics(
        self, rows: Sequence[Labelled], answers: Sequence[str], names: Sequence[str]
    ) -> dict[str, float]:
        wanted = [row.label for row in rows]
        measures = {
            "accuracy": lambda: sklearn.accuracy_score(wanted, answers),
            "f1": lambda: sklearn.f1_score(wanted, answers, average="macro", zero_division=0),
        }
        return measured(measures, names)


def sequence_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(B, labels) in float32.

    A decoder's class takes the last token that is not padding, which it finds in `input_ids`: under a prompt method
    it is given embeddings and would take a padded position. So its head's values of all tokens are taken instead,
    and from them the last of the mask; the same numbers where both can be had.
    """
    length = inputs["input_ids"].shape[1]
    with _seen(_head(model)) as seen:
        pooled = model(**inputs).logits
    if not seen or seen[0].ndim != 3:
        return pooled.float()
    last = length - 1 - inputs["attention_mask"].flip(1).argmax(dim=1)
    own = seen[0][:, -length:]
    return own[torch.arange(len(last), device=own.device), last.to(own.device)].float()


def _head(model: Any) -> nn.Module | None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "score", None)


@contextlib.contextmanager
def _seen(head: nn.Module | None) -> Iterator[list[Tensor]]:
    """Within the context, the list is filled with what the head gives."""
    seen: list[Tensor] = []
    if head is None:
        yield seen
        return
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def label_in(row: SourceRow, dataset: DatasetSpec) -> str:
    """The row's label as text; a truth value is one too."""
    name = present(row, "label", dataset.field_label or "label", dataset)
    value = row.values[name]
    if isinstance(value, bool):
        return str(value).lower()
    label = text_in(row, "label", dataset.field_label, dataset).strip()
    if not label:
        raise DataError(f"column {name!r} is empty: the row has no label.", where=row.where)
    return label


def in_order(labels: set[str]) -> tuple[str, ...]:
    """Labels in the order of the head's outputs: sorted, by number where all are numbers."""
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


def unknown_label(label: str, where: str, known: Sequence[str], what: str) -> DataError:
    """An evaluation row has a label that no training row has."""
    near = closest(label, known)
    nearest = f"Closest: {near[0]!r}. " if near else ""
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return DataError(
        f"the {what} {label!r} is in no row of data.datasets.", where=where, hint=f"{nearest}Known: {shown}."
    )
