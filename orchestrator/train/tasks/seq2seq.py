"""SEQ_2_SEQ_LM: a text that is read and one that is written, by an encoder-decoder. A target is a token of the text
that is written, its end counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.errors import ModelError
from orchestrator.spec.job import DatasetSpec, EvalSpec
from peft_dist.lazy import lazy

from ..rows.chunks import chunks
from ..rows.outline import IGNORED, Outline
from ..rows.records import hash_of, text_in
from ..rows.sources import SourceRow
from .causal import matches
from .encoding import encode, own_positions
from .generation import written
from .task import Answering, Batch, Padded, Task, pad_id, right_padded

sacrebleu = lazy("sacrebleu")
rouge_scorer = lazy("rouge_score.rouge_scorer")
MOST_WRITTEN = 256
"""Rows whose texts are written for the metrics, where `eval.max_rows` does not say more or less."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row's content."""

    where: str
    row_hash: str
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Translated:
    """One rendered row. `labels` are the tokens to be written."""

    input_ids: list[int]
    labels: list[int]
    source: str
    target: str
    row_hash: str
    where: str = ""
    full_length: int = 0
    """Of the longer of both texts."""
    task_id: int = 0

    @property
    def num_targets(self) -> int:
        """The tokens to be written."""
        return len(self.labels) if self.target.strip() else 0

    @property
    def is_truncated(self) -> bool:
        """Whether tokens of either text were cut off."""
        return self.full_length > max(len(self.input_ids), len(self.labels))

    def outline(self) -> Outline:
        """Both texts, the one that is written marked."""
        trained = [False] * len(self.input_ids) + [True] * len(self.labels)
        return Outline([*self.input_ids, *self.labels], trained, prompt_len=len(self.input_ids))


class Seq2Seq(Task):
    """Next-token prediction of the target under the source."""

    name = "SEQ_2_SEQ_LM"
    is_language = True

    @classmethod
    def read(cls, row: SourceRow, dataset: DatasetSpec) -> Record:
        source = text_in(row, "source", dataset.field_source, dataset)
        target = text_in(row, "target", dataset.field_target, dataset)
        return Record(row.where, hash_of("seq2seq", [source, target]), source, target)

    @classmethod
    def render(cls, records: Iterable[Record], tokenizer: Any, sequence_len: int) -> Iterator[Translated]:
        for batch in chunks(records):
            sources = encode(tokenizer, [record.source for record in batch], None, sequence_len)
            targets = tokenizer(text_target=[record.target for record in batch], verbose=False)["input_ids"]
            for record, source, target in zip(batch, sources, targets, strict=True):
                end = tokenizer.eos_token_id
                ids = target if end is None or target[-1:] == [end] else [*target, end]
                yield Translated(
                    source.ids,
                    ids[:sequence_len],
                    record.source,
                    record.target,
                    record.row_hash,
                    record.where,
                    max(source.full_length, len(ids)),
                )

    def collate(self, rows: Sequence[Translated], samples: Sequence[int]) -> Batch:
        padded = Padded(pad_id(self.tokenizer), [row.input_ids for row in rows])
        labels = right_padded([row.labels for row in rows], IGNORED)
        inputs = {**padded.inputs(), **self.task_ids(rows)}
        return Batch(inputs, {"labels": labels}, list(samples), int((labels != IGNORED).sum()))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        labels = batch.labels["labels"]
        begun = _shifted(labels, _start(model), pad_id(self.tokenizer))
        logits = own_positions(model(**batch.inputs, decoder_input_ids=begun).logits, labels.shape[1])
        is_target = labels != IGNORED
        if not is_target.any():
            return logits.float().sum() * 0.0
        return F.cross_entropy(logits[is_target].float(), labels[is_target], reduction="sum")

    def answerable(
        self, rows: Sequence[Translated], names: Sequence[str], spec: EvalSpec
    ) -> Sequence[Translated]:
        return rows if spec.max_rows is not None else rows[:MOST_WRITTEN]

    def answers(self, model: nn.Module, rows: Sequence[Translated], how: Answering) -> list[str]:
        padded = Padded(pad_id(self.tokenizer), [row.input_ids for row in rows])
        return written(model, {**padded.inputs(), **self.task_ids(rows)}, how)

    def metrics(
        self, rows: Sequence[Translated], answers: Sequence[str], names: Sequence[str]
    ) -> dict[str, float]:
        wanted = [row.target for row in rows]
        found = matches(wanted, answers, names)
        if "chrf" in names:
            found["chrf"] = float(sacrebleu.corpus_chrf(list(answers), [wanted]).score)
        if rouges := [name for name in names if name.startswith("rouge")]:
            scorer = rouge_scorer.RougeScorer(rouges, use_stemmer=False)
            scores = [scorer.score(right, text) for right, text in zip(wanted, answers, strict=True)]
            found |= {name: sum(s[name].fmeasure for s in scores) / len(scores) for name in rouges}
        return {name: found[name] for name in names}


def _shifted(labels: Tensor, start: int, pad: int) -> Tensor:
    """What the decoder is given: the target, one place on, behind the token that begins it."""
    begun = torch.full_like(labels, start)
    begun[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, pad)
    return begun


def _start(model: Any) -> int:
    for name in ("decoder_start_token_id", "bos_token_id"):
        if (token := getattr(model.config, name, None)) is not None:
            return int(token)
    raise ModelError(
        "the base's config names no decoder_start_token_id, with which a text begins.",
        where="model.base_model",
        hint="Use an encoder-decoder such as T5 or BART; for a decoder, write `type: prompt_completion`.",
    )
