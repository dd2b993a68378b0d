"""Evaluation: the loss on held-out rows and the task's metrics, the same code for every adapter.

Batches are cut from the rows in their order, by global index, and dealt to the ranks in turn; the sums of
each batch are collected and added in that order, answers put into the order of their rows. The result does not
depend on the number of ranks, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peft_dist
from orchestrator.errors import DataError
from orchestrator.spec.job import EvalSpec
from peft_dist.contract import PastMethod
from peft_dist.rows import Rows

from ..group import Group
from ..rows.bins import in_order
from ..tasks import Answering, Batch, Task
from ..tasks.embedding import Embedding
from .seat import ADAPTER


class Stopped(Exception):
    """A stop was asked for; every rank raises it at the same place."""


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate and how; the same object serves each adapter of a comparison.

    Args:
        rows: the evaluation's rows in their order.
        task: how their loss is computed and their answers are made and compared.
        batch_size: rows per forward of one rank.
        group: the ranks that share the work.
        spec: `max_rows`, `max_new_tokens`.
        metrics: what is measured beside `eval_loss`.
        is_sharded: ZeRO-3: every rank must take part in every forward.
        should_stop: asked before each batch.
        capacity: tokens of a sequence that several rows share; None where each has its own. A batch is then so many
            sequences.
    """

    rows: Sequence[Any]
    task: Task
    batch_size: int
    group: Group
    spec: EvalSpec
    metrics: tuple[str, ...] = ()
    is_sharded: bool = False
    should_stop: Callable[[], bool] = lambda: False
    capacity: int | None = None

    @property
    def used(self) -> Sequence[Any]:
        """The rows that `max_rows` leaves."""
        return self.rows[: self.spec.max_rows]

    def measure(self, model: nn.Module, known_loss: float | None = None) -> dict[str, float]:
        """`eval_loss`, of languages `perplexity`, and the metrics of the model as it is; {} without rows.

        Args:
            known_loss: `eval_loss`, where these rows were measured with this adapter already.
        """
        if not self.used:
            return {}
        with _evaluating(model):
            loss = self._loss(model) if known_loss is None else known_loss
            found = {"eval_loss": loss}
            if self.task.is_language:
                found["perplexity"] = math.exp(loss) if loss < 700 else math.inf
            if self.metrics:
                rows = self.task.answerable(self.used, self.metrics, self.spec)
                found |= self.task.metrics(rows, self.answers(model, rows), self.metrics)
        return found

    def loss_only(self, model: nn.Module) -> dict[str, float]:
        """`eval_loss` alone, for evaluations while a run trains."""
        if not self.used:
            return {}
        with _evaluating(model):
            return {"eval_loss": self._loss(model)}

    def answers(self, model: nn.Module, rows: Sequence[Any]) -> list[Any]:
        """What the model says to each row, on every rank."""
        how = Answering(
            self.task.tokenizer,
            self.group.device,
            self.spec.max_new_tokens,
            is_sharded=self.is_sharded and self.group.size > 1,
        )
        mine = self._dealt(self._cut(rows), lambda batch: self.task.answers(model, batch, how))
        every: dict[int, list[Any]] = {}
        for part in self.group.gather_plain(mine):
            every |= part
        return [answer for number in sorted(every) for answer in every[number]]

    def _loss(self, model: nn.Module) -> float:
        if isinstance(self.task, Embedding):  # a row's loss is with respect to all others
            return self.task.loss_of(self.used, self.answers(model, self.used))

        def sums(rows: Sequence[Any]) -> tuple[float, float]:
            batch = self._collated(rows).to(self.group.device)
            with torch.no_grad(), _apart(model, batch):
                return float(self.task.loss(model, batch)), float(batch.targets)

        alike = sorted(self.used, key=lambda row: len(row.input_ids))  # so that little is padded
        batches = self._shared_sequences() if self._shares(model) else self._cut(alike)
        mine = self._dealt(batches, sums)
        found = [0.0] * (2 * len(batches))
        for number, pair in mine.items():
            found[2 * number : 2 * number + 2] = pair
        summed = self.group.sum(found)
        total, count = math.fsum(summed[::2]), math.fsum(summed[1::2])
        if count == 0:
            raise DataError(
                f"none of the {len(self.used)} evaluation rows has a target token.",
                where="data",
                hint="Raise data.sequence_len, or see `raypeft inspect` for what is trained on.",
            )
        return total / count

    def _cut(self, rows: Sequence[Any]) -> list[Sequence[Any]]:
        return [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]

    def _shares(self, model: nn.Module) -> bool:
        """Whether rows share sequences: not where those of a row would share one past."""
        active: Any = getattr(model, "active_peft_config", None)
        return self.capacity is not None and not isinstance(active, PastMethod)

    def _shared_sequences(self) -> list[Sequence[Any]]:
        """Batches of sequences, each a list of rows."""
        lengths = [len(row.input_ids) for row in self.used]
        bins = [[self.used[row] for row in rows] for rows in in_order(lengths, self.capacity or 0)]
        return self._cut(bins)

    def _collated(self, rows: Sequence[Any]) -> Batch:
        if not isinstance(rows[0], list):
            return self.task.collate(rows, range(len(rows)))
        every = [row for one in rows for row in one]
        return self.task.binned(every, range(len(every)), [len(one) for one in rows])

    def _dealt(self, batches: Sequence[Any], work: Callable[[Sequence[Any]], Any]) -> dict[int, Any]:
        """What `work` gave for each batch that fell to this rank, by the batch's number."""
        found = {}
        for turn in range(math.ceil(len(batches) / self.group.size)):
            if self.group.any(self.should_stop()):
                raise Stopped
            number = turn * self.group.size + self.group.rank
            if number < len(batches):
                found[number] = work(batches[number])
            elif self.is_sharded:
                work(batches[0][:1])
        return found


def measure_base(evaluation: Evaluation, model: nn.Module) -> dict[str, float]:
    """Metrics of the bare base as `base.NAME`."""
    with model.disable_adapter():  # type: ignore[operator]
        return _named("base", evaluation.measure(model))


def compare(
    evaluation: Evaluation, model: nn.Module, others: Mapping[str, str], active: str = ADAPTER
) -> dict[str, float]:
    """Metrics of other adapters as `LABEL.NAME`, over the same rows.

    Args:
        others: label -> local directory of an adapter for the same base.
        active: the adapter that is the active one before and after.
    """
    found: dict[str, float] = {}
    for label, directory in others.items():
        name = label if active == ADAPTER else f"{active}-{label}"
        model.load_adapter(str(directory), name)  # type: ignore[operator]
        model.set_adapter(name)  # type: ignore[operator]
        try:
            found |= _named(label, evaluation.measure(model))
        finally:
            model.set_adapter(active)  # type: ignore[operator]
            model.delete_adapter(name)  # type: ignore[operator]
    return found


def evaluate_adapter(
    base: nn.Module,
    task: Task,
    adapter_dir: str | Path | None,
    rows: Sequence[Any],
    spec: EvalSpec = EvalSpec(),
    metrics: tuple[str, ...] = (),
    *,
    batch_size: int = 8,
    device: str = "cpu",
) -> dict[str, float]:
    """Metrics of one adapter, or of the bare base (`adapter_dir=None`), in this process.

    The base comes back without the adapter; loaded by `peft_dist.loading.load_base`.
    """
    evaluation = Evaluation(rows, task, batch_size, Group(device), spec, metrics)
    if adapter_dir is None:
        return evaluation.measure(base.to(device))
    model = peft_dist.PeftModel.from_pretrained(base, str(adapter_dir), adapter_name=ADAPTER).to(device)
    try:
        return evaluation.measure(model)
    finally:
        model.unload()


def _apart(model: nn.Module, batch: Batch) -> contextlib.AbstractContextManager[None]:
    """Within the context adapters know which sequences share a row."""
    if batch.bins is None:
        return contextlib.nullcontext()
    rows = Rows(samples=torch.tensor(batch.samples), bins=batch.bins)
    return model.using(rows)  # type: ignore[operator]


def _named(label: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{label}.{name}": value for name, value in metrics.items()}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
