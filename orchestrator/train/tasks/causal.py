"""CAUSAL_LM: chats, prompts with answers, plain texts. A target is a trained token; a prompt
method may count tokens of its own and weigh them (CPT's context)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from orchestrator.errors import DataError
from orchestrator.spec.job import DatasetSpec, EvalSpec
from peft_dist.bins import bins_of
from peft_dist.contract import PromptMethod

from ..rows.batches import collate
from ..rows.outline import IGNORED
from ..rows.records import Record, record
from ..rows.render import Example, render
from ..rows.sources import SourceRow
from .generation import continuations
from .head import for_targets
from .loss import num_targets, target_loss
from .task import Answering, Batch, Task, pad_id, right_padded


class CausalLM(Task):
    """Next-token prediction of the answers."""

    name = "CAUSAL_LM"
    is_language = True

    @classmethod
    def read(cls, row: SourceRow, dataset: DatasetSpec) -> Record:
        return record(row, dataset)

    @classmethod
    def render(cls, records: Iterable[Record], tokenizer: Any, sequence_len: int) -> Iterator[Example]:
        return render(records, tokenizer, sequence_len)

    def collate(self, rows: Sequence[Example], samples: Sequence[int]) -> Batch:
        tensors = collate(rows, pad_id(self.tokenizer))
        labels = tensors.pop("labels")
        inputs = {**tensors, **self.task_ids(rows)}
        counted = self.method.targets(labels, {}) if isinstance(self.method, PromptMethod) else None
        if counted is None:
            return Batch(inputs, {"labels": labels}, list(samples), num_targets(labels))
        labels, weights = counted
        return Batch(inputs, {"labels": labels, "weights": weights}, list(samples), num_targets(labels))

    def binned(self, rows: Sequence[Example], samples: Sequence[int], counts: Sequence[int]) -> Batch:
        ends = list(itertools.accumulate(counts))
        parts = [rows[end - count : end] for count, end in zip(counts, ends, strict=True)]
        bins = bins_of([[len(row.input_ids) for row in part] for part in parts])
        ids = right_padded([_joined(row.input_ids for row in part) for part in parts], pad_id(self.tokenizer))
        labels = right_padded([_joined(row.labels for row in part) for part in parts], IGNORED)
        labels = labels.masked_fill(bins.starts(), IGNORED)  # nothing of its own sequence foretells it
        inputs = {"input_ids": ids, "position_ids": bins.positions(), **self.task_ids(rows)}
        return Batch(inputs, {"labels": labels}, list(samples), num_targets(labels), bins)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        labels = batch.labels["labels"]
        with for_targets(model, labels, batch.bins):
            # a base with a cache would take its positions for those of one long sequence
            logits = model(**batch.inputs, **({"use_cache": False} if batch.bins else {})).logits
        return target_loss(logits, labels, batch.labels.get("weights"))

    def answerable(self, rows: Sequence[Example], names: Sequence[str], spec: EvalSpec) -> Sequence[Example]:
        asked = [row for row in rows if row.prompt_len > 0 and row.answer.strip()]
        if not asked:
            raise DataError(
                f"{', '.join(names)}: none of the {len(rows)} evaluation rows has a prompt "
                "and an answer to compare with.",
                where="eval.metrics",
                hint="Generated metrics need rows of type chat, prompt_completion or alpaca.",
            )
        return asked

    def answers(self, model: nn.Module, rows: Sequence[Example], how: Answering) -> list[str]:
        prompts = [row.input_ids[: row.prompt_len] for row in rows]
        return continuations(model, prompts, how, self.task_ids(rows))

    def metrics(
        self, rows: Sequence[Example], answers: Sequence[str], names: Sequence[str]
    ) -> dict[str, float]:
        return matches([row.answer for row in rows], answers, names)


def _joined(parts: Iterable[Sequence[int]]) -> list[int]:
    return [number for part in parts for number in part]


def matches(wanted: Sequence[str], given: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """`exact_match` and `contains`, those that are named: shares of the answers, blanks around them aside."""
    pairs = [(right.strip(), text) for right, text in zip(wanted, given, strict=True)]
    hits = {
        "exact_match": [text == right for right, text in pairs],
        "contains": [right in text for right, text in pairs],
    }
    return {name: sum(hits[name]) / len(pairs) for name in names if name in hits}
