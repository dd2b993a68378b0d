"""What a run's rows are to the model: how one becomes tokens, what its loss is, what is measured of it.

One file a task; the loop, the evaluation and the account of rows are the same for all of them. The loss of a step
is always the sum over targets divided by their number over all ranks and micro-batches; what a target is, the task
says: a token, an example, an anchor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from orchestrator.spec.job import DatasetSpec, EvalSpec
from peft_dist.bins import Bins
from peft_dist.rows import Rows

from ..group import Group
from ..rows.outline import IGNORED, Outline
from ..rows.sources import SourceRow


class Row(Protocol):
    """One rendered row, whatever its task."""

    @property
    def input_ids(self) -> list[int]:
        """All tokens that are read."""

    @property
    def row_hash(self) -> str:
        """Of its content."""

    @property
    def where(self) -> str:
        """`file:line`."""

    @property
    def full_length(self) -> int:
        """Tokens before truncation."""

    @property
    def task_id(self) -> int:
        """The number of the task within a method that learns several; 0 where it learns one."""

    @property
    def num_targets(self) -> int:
        """What the loss counts of it; a row of none is left out."""

    @property
    def is_truncated(self) -> bool:
        """Whether it does not fit as a whole."""

    def outline(self) -> Outline:
        """What it shows of itself."""


@dataclass(frozen=True)
class Facts:
    """What the rows together say, which the head and the answers need; saved beside the adapter."""

    labels: tuple[str, ...] = ()
    """The classes, in the order of the head's outputs."""
    may_be_empty: bool = False
    """qa: whether some question has no answer."""


@dataclass(frozen=True)
class Batch:
    """One forward."""

    inputs: dict[str, Tensor]
    """Arguments of the model's forward, one entry a sequence."""
    labels: dict[str, Tensor]
    """What its outputs are compared with."""
    samples: list[int]
    """A number for each sequence that no other of the step has: what its dropout follows from."""
    targets: int
    bins: Bins | None = None
    """Where several sequences share a row of the inputs."""

    def to(self, device: str) -> Batch:
        """The same on a device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, labels={name: t.to(device) for name, t in self.labels.items()})


@dataclass(frozen=True)
class Step:
    """What a task's backward needs of one optimizer step."""

    model: nn.Module
    group: Group
    seed: int
    number: int
    targets: float
    """Of all ranks and micro-batches."""
    scale: float
    """What an fp16 loss is multiplied with."""
    adapter: str | None = None
    """What its rows name, where runs share the model."""

    @property
    def factor(self) -> float:
        """What a summed loss is multiplied with before its backward."""
        return self.scale / max(1.0, self.targets)

    def using(self, batch: Batch) -> AbstractContextManager[None]:
        """Within the context the dropout of a sequence follows from the seed, the step and its number."""
        adapters = None if self.adapter is None else [self.adapter] * len(batch.samples)
        rows = Rows(adapters, torch.tensor(batch.samples), seed=self.seed, step=self.number, bins=batch.bins)
        return self.model.using(rows)  # type: ignore[operator]


@dataclass(frozen=True)
class Answering:
    """How answers are made while a model is evaluated."""

    tokenizer: Any
    device: str = "cpu"
    max_new_tokens: int = 64
    is_sharded: bool = False
    """ZeRO-3 over several ranks: all of them must take part."""


class Task(ABC):
    """One task. `name` is PEFT's; `is_language` says whether exp(loss) is a perplexity.

    Args:
        tokenizer: the base's.
        facts: what `facts` found in the rows.
        takes_task_ids: whether the adapter's method learns several tasks and reads `task_ids`.
        method: of the adapter that is trained, where it may count a loss of its own; None while it is measured.
    """

    name: ClassVar[str]
    is_language: ClassVar[bool] = False
    has_labels: ClassVar[bool] = False
    """Whether its head tells the labels of its rows apart."""

    def __init__(
        self,
        tokenizer: Any,
        facts: Facts = Facts(),
        *,
        takes_task_ids: bool = False,
        method: Any = None,
    ) -> None:
        self.tokenizer, self.known, self.takes_task_ids, self.method = (
            tokenizer,
            facts,
            takes_task_ids,
            method,
        )

    # --- rows

    @classmethod
    @abstractmethod
    def read(cls, row: SourceRow, dataset: DatasetSpec) -> Any:
        """The row's content, with its hash; raises DataError naming the column that does not fit."""

    @classmethod
    @abstractmethod
    def render(cls, records: Iterable[Any], tokenizer: Any, sequence_len: int) -> Iterator[Any]:
        """Yields a `Row` for each record, in order."""

    @classmethod
    def facts(cls, rows: Sequence[Any]) -> Facts:
        """What all rows of the training data together say."""
        return Facts()

    def check(self, rows: Sequence[Any]) -> None:
        """Raises DataError where evaluation rows do not fit what training rows said."""
        return None

    # --- batches

    @abstractmethod
    def collate(self, rows: Sequence[Any], samples: Sequence[int]) -> Batch:
        """The batch of at least one row; `samples` are their numbers within the step."""

    def binned(self, rows: Sequence[Any], samples: Sequence[int], counts: Sequence[int]) -> Batch:
        """The batch of rows of which the first `counts[0]` share a sequence, the next `counts[1]` another."""
        raise NotImplementedError(f"{self.name} rows do not share sequences")

    def silent(self, row: Any) -> Batch:
        """A batch without targets, for a rank that has nothing to do and takes part all the same."""
        return self.silenced(self.collate([row], [0]))

    def silenced(self, batch: Batch) -> Batch:
        """The batch without its targets."""
        labels = {name: torch.full_like(labels, IGNORED) for name, labels in batch.labels.items()}
        return replace(batch, labels=labels, targets=0)

    def task_ids(self, rows: Sequence[Row], times: int = 1) -> dict[str, Tensor]:
        """The argument `task_ids` of a forward over the rows, each `times` in turn; none where the method reads
        none."""
        if not self.takes_task_ids:
            return {}
        return {"task_ids": torch.tensor([row.task_id for row in rows for _ in range(times)])}

    # --- loss

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the loss over the targets of a batch, a float32 scalar; a batch without targets gives a
        zero that still has a gradient."""

    def backward(self, step: Step, batches: Sequence[Batch]) -> float:
        """Adds the gradients of this rank's part of a step; returns its summed loss."""
        total = 0.0
        for batch in batches:
            with step.using(batch):
                loss = self.loss(step.model, batch)
                (loss * step.factor).backward()
            total += float(loss.detach())
        return total

    # --- evaluation

    def answers(self, model: nn.Module, rows: Sequence[Any], how: Answering) -> list[Any]:
        """What the model says to each row: plain values that are compared in `metrics`."""
        return [None] * len(rows)

    def answerable(self, rows: Sequence[Any], names: Sequence[str], spec: EvalSpec) -> Sequence[Any]:
        """The rows that `answers` is asked for; raises DataError where there is none."""
        return rows

    def metrics(self, rows: Sequence[Any], answers: Sequence[Any], names: Sequence[str]) -> dict[str, float]:
        """The named metrics over all rows."""
        return {}


@dataclass
class Padded:
    """Sequences padded on the right to the longest of them."""

    pad: int
    ids: list[list[int]] = field(default_factory=list)
    types: list[list[int] | None] = field(default_factory=list)

    def inputs(self) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and, where the tokenizer tells pairs apart, `token_type_ids`: int64
        (B, longest)."""
        longest = max(map(len, self.ids))
        found = {
            "input_ids": right_padded(self.ids, self.pad, longest),
            "attention_mask": right_padded([[1] * len(ids) for ids in self.ids], 0, longest),
        }
        if all(types is not None for types in self.types) and self.types:
            found["token_type_ids"] = right_padded([types or [] for types in self.types], 0, longest)
        return found


def right_padded(rows: Sequence[Sequence[int]], fill: int, longest: int | None = None) -> Tensor:
    """int64 (B, longest)."""
    width = max(map(len, rows)) if longest is None else longest
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.long)


def measured(measures: Mapping[str, Callable[[], float]], names: Sequence[str]) -> dict[str, float]:
    """The measures that are asked for, taken; others are not."""
    return {name: float(measures[name]()) for name in names if name in measures}


def pad_id(tokenizer: Any) -> int:
    """The token that fills rows up: the tokenizer's own, else its end of text, else 0. Masked everywhere."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
