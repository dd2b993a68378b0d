"""One forward and backward over micro-batches of several runs on one base, each served by its own adapter.

A run's loss is computed by its own task from its own rows of what the model gives, as if it had been asked alone: the
task is run twice, first to hear what it asks of the model, then to be answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_dist.bins import Bins
from peft_dist.contract import PromptMethod
from peft_dist.errors import RowsError
from peft_dist.rows import Rows

from ..rows.outline import IGNORED
from ..tasks import Batch, Task
from ..tasks.causal import CausalLM
from ..tasks.classification import Classification
from ..tasks.head import for_targets
from ..tasks.seq2seq import Seq2Seq
from ..tasks.task import pad_id
from .loop import Ready


@dataclass(frozen=True)
class Part:
    """One run's part of a step."""

    adapter: str
    task: Task
    ready: Ready


def cannot_join(task: Task, model: nn.Module) -> str | None:
    """Why micro-batches of the task cannot run beside others', in a few words; None where they can."""
    if type(task).backward is not Task.backward:
        return "its loss is over all rows of a step at once"
    base: Any = model.get_base_model()  # type: ignore[operator]
    if isinstance(task, Classification) and getattr(base, "score", None) is not None:
        return "its head takes the last token of each row by itself"
    return None


def backward(model: nn.Module, parts: Sequence[Part]) -> list[float]:
    """Adds the gradients of all parts; returns each one's summed loss.

    Micro-batches run together by their number: a run with more of them than others goes on without those.

    Raises:
        RowsError: a layer of the base cannot tell whose the rows are.
    """
    totals = [0.0] * len(parts)
    for number in range(max(len(part.ready.batches) for part in parts)):
        here = [i for i, part in enumerate(parts) if number < len(part.ready.batches)]
        losses = _losses(model, [parts[i] for i in here], number)
        sum(
            (loss * parts[i].ready.step.factor for i, loss in zip(here, losses, strict=True)),
            losses[0].new_zeros(()),
        ).backward()
        for i, loss in zip(here, losses, strict=True):
            totals[i] += float(loss.detach())
    return totals


def _losses(model: nn.Module, parts: Sequence[Part], number: int) -> list[Tensor]:
    batches = _widened([part.task for part in parts], [part.ready.batches[number] for part in parts])
    asked = [_asked(part.task, model, batch) for part, batch in zip(parts, batches, strict=True)]
    counts = [len(batch.inputs["input_ids"]) for batch in batches]
    shared = [batch.bins for batch in batches if batch.bins is not None]
    if shared and len(parts) > 1 and any(isinstance(part.task.method, PromptMethod) for part in parts):
        # they move what follows them in a sequence, and with it whose positions are whose
        raise RowsError("virtual tokens between rows that share a sequence. Run one adapter at a time.")
    lengths = tuple(row for bins in shared for row in bins.lengths)
    rows = Rows(
        [part.adapter for part, batch in zip(parts, batches, strict=True) for _ in batch.samples],
        torch.tensor([sample for batch in batches for sample in batch.samples]),
        streams={part.adapter: (part.ready.step.seed, part.ready.step.number) for part in parts},
        bins=Bins(lengths) if shared else None,
    )
    # else a task of its own reads more of what the model gives than its targets
    picks = all(isinstance(part.task, CausalLM) for part in parts)
    with model.using(rows), _for_targets(model, batches) if picks else nullcontext():  # type: ignore[operator]
        given = model(**_together(asked, counts))
    losses, at, target = [], 0, 0
    for part, batch, count in zip(parts, batches, counts, strict=True):
        own = _cut(given, at, at + count, sum(counts))
        if picks and given.logits.ndim == 2:
            own.logits = given.logits[target : target + batch.targets]
        losses.append(part.task.loss(_Answer(model, own), batch))  # type: ignore[arg-type]
        at, target = at + count, target + batch.targets
    return losses


def _for_targets(model: nn.Module, batches: Sequence[Batch]) -> AbstractContextManager[None]:
    """`for_targets` of batches side by side, of which each may have virtual tokens of its own among its labels."""
    labels = [batch.labels["labels"][:, 1:] for batch in batches]  # a row's first token is no target
    widest = max(each.shape[1] for each in labels) + 1
    together = torch.cat([F.pad(each, (widest - each.shape[1], 0), value=IGNORED) for each in labels])
    return for_targets(model, together, next((batch.bins for batch in batches if batch.bins), None))


def _widened(tasks: Sequence[Task], batches: Sequence[Batch]) -> list[Batch]:
    """The batches padded on the right to the longest of them."""
    longest: dict[str, int] = {}
    targets = 0
    for batch in batches:
        for name, tensor in batch.inputs.items():
            if tensor.ndim > 1:
                longest[name] = max(longest.get(name, 0), tensor.shape[1])
        if (labels := batch.labels.get("labels")) is not None and labels.ndim > 1:
            targets = max(targets, labels.shape[1])
    return [_wide(task, batch, longest, targets) for task, batch in zip(tasks, batches, strict=True)]


def _wide(task: Task, batch: Batch, longest: Mapping[str, int], targets: int) -> Batch:
    pad, more = pad_id(task.tokenizer), longest["input_ids"] - batch.inputs["input_ids"].shape[1]
    inputs = {
        name: _padded(tensor, longest[name] - tensor.shape[1], pad if name == "input_ids" else 0)
        if tensor.ndim > 1
        else tensor
        for name, tensor in batch.inputs.items()
    }
    labels = {}
    for name, tensor in batch.labels.items():
        by = more if not isinstance(task, Seq2Seq) else targets - tensor.shape[1]
        fill = 0 if tensor.is_floating_point() else IGNORED
        labels[name] = _padded(tensor, by, fill) if tensor.ndim > 1 else tensor
    return replace(batch, inputs=inputs, labels=labels)


def _padded(tensor: Tensor, more: int, fill: int) -> Tensor:
    return F.pad(tensor, (0, more), value=fill) if more else tensor


def _together(asked: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, Any]:
    """Arguments of one call that are those of all; what a run's method does not read is zero for its rows."""
    names = dict.fromkeys(name for each in asked for name in each)
    made: dict[str, Any] = {}
    for name in names:
        like = next(each[name] for each in asked if name in each)
        if not isinstance(like, Tensor):
            made[name] = like
            continue
        if not all(name in each for each in asked) and like.ndim > 1:
            raise RowsError(f"{name} is given for some of the runs alone. Run one adapter at a time.")
        made[name] = torch.cat(
            [
                each[name] if name in each else like.new_zeros(count)
                for each, count in zip(asked, counts, strict=True)
            ]
        )
    return made


def _asked(task: Task, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The arguments with which the task's loss calls the model."""
    try:
        task.loss(_Question(model), batch)  # type: ignore[arg-type]
    except _Asked as asked:
        return asked.inputs
    raise RowsError(f"{task.name}: its loss does not run the model.")


def _cut(given: Any, start: int, stop: int, count: int) -> SimpleNamespace:
    """The rows of one run of what the model gave."""
    return SimpleNamespace(
        **{
            name: value[start:stop] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
            for name, value in given.items()
        }
    )


class _Asked(Exception):
    def __init__(self, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.inputs = inputs


class _Question:
    """Stands for a model until it is called."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Tensor) -> Any:
        raise _Asked(inputs)


class _Answer:
    """Stands for a model that was called already."""

    def __init__(self, model: nn.Module, given: SimpleNamespace) -> None:
        self._model, self._given = model, given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Tensor) -> SimpleNamespace:
        return self._given
