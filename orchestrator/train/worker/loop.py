"""The training loop of one worker: steps, evaluations and checkpoints, with or without other ranks.

One step is one global batch: its loss is the sum over the targets of all ranks and micro-batches, divided by
their number, and what a method adds to it by itself. Everything that a step depends on is in the model, the
optimizer's states, the controllers' and `Position`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import NotFiniteError, StorageError
from orchestrator.runner import TrainRequest
from peft_dist.optim import AdapterOptimizer

from ..events import Told
from ..group import Group
from ..rows.batches import StepBatch, num_steps, steps
from ..tasks import Batch, Step, Task
from ..tasks.loss import LossScale
from .checkpoint import Position, prune, write_checkpoint
from .controllers import Controllers
from .evaluate import Evaluation, Stopped
from .raw_tensors import raw_tensors
from .schedule import evaluates_at, learning_rate, saves_at
from .seat import ADAPTER, Seat


@dataclass(frozen=True)
class StepOutcome:
    """One optimizer step, summed over all ranks."""

    loss: float
    grad_norm: float
    target_tokens: float
    tokens: float


@dataclass(frozen=True)
class Ready:
    """One rank's part of a step before its backward."""

    step: Step
    batches: list[Batch]
    tokens: float
    """Of all ranks."""


class Training:
    """A run in progress on this rank.

    Args:
        seat: the adapter that is trained.
        optimizer: with the seat's adapter among those that it trains.
        task: what the rows are to the model.
        examples: the training rows, the same on every rank.
        position: where to start; step 0 for a fresh run.
        save_adapter: writes the adapter into a directory; a collective.
        capacity: tokens of a sequence that several rows share; None where each has its own.
        reporter: rank 0's way to the driver, with the request to stop; None elsewhere.
    """

    def __init__(
        self,
        request: TrainRequest,
        seat: Seat,
        optimizer: AdapterOptimizer,
        task: Task,
        examples: Sequence[Any],
        evaluation: Evaluation,
        group: Group,
        position: Position,
        *,
        save_adapter: Callable[[str], None],
        precision: str = "fp32",
        capacity: int | None = None,
        reporter: Told | None = None,
    ) -> None:
        self.request, self.spec, self.plan = request, request.spec, request.plan
        self.seat, self.optimizer, self.task = seat, optimizer, task
        self.model, self.own = seat.model, [seat.adapter]
        self.controllers = Controllers(seat, seat.trained().values())
        self.examples, self.evaluation, self.group = examples, evaluation, group
        self.position, self.reporter, self.save_adapter = position, reporter, save_adapter
        self.capacity = capacity
        self.saved_step, self.saved_url = position.step, ""
        self.scale = LossScale(precision == "fp16")
        if self.scale.enabled and position.step:
            self.scale.value, self.scale.good_steps = position.loss_scale, position.scale_good_steps
        training = self.spec.training
        self.steps_per_epoch = math.ceil(len(examples) / self.plan.global_batch_size)
        self.total_steps = num_steps(
            len(examples),
            epochs=training.num_epochs,
            max_steps=training.max_steps,
            global_batch_size=self.plan.global_batch_size,
        )
        self._throughput = Throughput()

    @property
    def should_stop(self) -> bool:
        """Whether this rank was asked to stop; ranks must agree before they act on it."""
        return self.reporter is not None and self.reporter.stop_requested

    def run(self) -> None:
        """Steps until the last one.

        Raises:
            Stopped: a stop was asked for; the checkpoint is saved.
            NotFiniteError: the loss or a gradient is not a number; earlier checkpoints stay.
        """
        self.rehearse()
        for batch in self.batches():
            self.leave_if_asked()
            self.took(batch, self.take_step(batch))

    @torch.no_grad()
    def rehearse(self) -> None:
        """Runs a row that counts for nothing, where steps are to come. Layers learn from a forward which of them take
        one input, and then sum its gradients together, rounded otherwise than before: so a process that goes on takes
        every step as the one before it would have."""
        if self.position.step >= self.total_steps:
            return
        batch = self.task.silent(self.examples[0]).to(self.group.device)
        step = Step(self.model, self.group, self.spec.training.seed, 0, 1.0, 1.0, self.seat.in_rows)
        with step.using(batch):
            self.task.loss(self.model, batch)

    def leave_if_asked(self) -> None:
        """Raises Stopped, the checkpoint saved, where any rank was asked to stop."""
        if self.group.any(self.should_stop):
            self._save_and_stop()

    def took(self, batch: StepBatch, outcome: StepOutcome) -> None:
        """After a step: what is told of it, and the evaluation and checkpoint that are due.

        Raises:
            Stopped: a stop was asked for during the evaluation; the checkpoint is saved.
        """
        self._advance(batch, outcome)
        self._report(outcome)
        step = self.position.step
        is_last = step == self.total_steps
        try:
            if is_last or evaluates_at(step, self.steps_per_epoch, self.spec.training):
                self.evaluate()
        except Stopped:
            self._save_and_stop()
        if is_last or saves_at(step, self.steps_per_epoch, self.spec.training):
            self.save()

    def take_step(self, batch: StepBatch) -> StepOutcome:
        """Forward, backward and update over one global batch; nothing is changed where the loss is not
        finite.

        Raises:
            NotFiniteError: the loss or the gradients are not finite.
        """
        ready = self.prepare(batch)
        return self.complete(ready, self.task.backward(ready.step, ready.batches))

    def prepare(self, batch: StepBatch) -> Ready:
        """All of a step before its backward: rows on the device, the rate, no gradient."""
        step = batch.step + 1
        torch.manual_seed(_mixed(self.spec.training.seed, step, self.group.rank))
        parts = [[self.examples[row] for row in rows] for rows in batch.micro]
        counts: Sequence[list[int] | None] = batch.bins or [None] * len(parts)
        batches = [
            self._collated(part, samples, count)
            for part, samples, count in zip(parts, batch.samples, counts, strict=True)
        ]
        targets, tokens = self.group.sum(
            [
                float(sum(one.targets for one in batches)),
                float(sum(len(example.input_ids) for part in parts for example in part)),
            ]
        )
        rate = learning_rate(step, self.total_steps, self.spec.training)
        self.optimizer.set_learning_rate(self.seat.adapter, rate)
        self.optimizer.zero_grad(self.own)
        seed, scale = self.spec.training.seed, self.scale.value
        this = Step(self.model, self.group, seed, step, targets, scale, self.seat.in_rows)
        return Ready(this, [one.to(self.group.device) for one in batches], tokens)

    def _collated(self, rows: list[Any], samples: list[int], counts: list[int] | None) -> Batch:
        task, nothing = self.task, self.examples[0]
        if counts is None:
            return task.collate(rows, samples) if rows else task.silent(nothing)
        return task.binned(rows, samples, counts) if rows else task.silenced(task.binned([nothing], [0], [1]))

    def complete(self, ready: Ready, mine: float) -> StepOutcome:
        """All of a step after its backward.

        Args:
            mine: the summed loss of this rank's part.

        Raises:
            NotFiniteError: the loss or the gradients are not finite.
        """
        step, targets = ready.step.number, ready.step.targets
        loss = self.group.sum([mine])[0] / max(1.0, targets)
        if not math.isfinite(loss):
            raise self._not_finite("loss", loss, step)
        norm = self._update(step)
        overflowed = not math.isfinite(norm)
        self.scale.update(overflowed)
        if overflowed and (not self.scale.enabled or self.scale.is_exhausted):
            raise self._not_finite("gradient", norm, step)
        return StepOutcome(loss, norm, targets, ready.tokens)

    def evaluate(self) -> None:
        """Measures `eval_loss` on the held-out rows, keeps it in the position and reports it."""
        if not self.evaluation.used:
            return
        with self.seat.active():
            metrics = self.evaluation.loss_only(self.model)
        self.position = replace(self.position, metrics=metrics, evaluated_at=self.position.step)
        self._emit("eval", step=self.position.step, metrics=metrics)
        self._throughput.pause_ended()

    def save(self) -> None:
        """Commits a checkpoint of this step and prunes older ones."""
        if self.saved_step == self.position.step:
            return
        state = self._optimizer_state() | self.controllers.state() | raw_tensors(self.seat)
        url = write_checkpoint(
            self.request.run_dir,
            replace(self.position, loss_scale=self.scale.value, scale_good_steps=self.scale.good_steps),
            self.save_adapter,
            state if self.group.is_first else None,
            self.request.fence,
        )
        if self.group.is_first:
            self._prune()
        self.saved_step, self.saved_url = self.position.step, url
        self._emit("checkpoint", step=self.position.step, path=url)
        self._throughput.pause_ended()

    def _optimizer_state(self) -> dict[str, Tensor]:
        """By the names of a run alone."""
        prefix = f"{self.seat.adapter}/"
        state = self.optimizer.whole_state(self.own)
        return {f"{ADAPTER}/{name.removeprefix(prefix)}": tensor for name, tensor in state.items()}

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what a checkpoint holds of it; each rank takes what it owns."""
        prefix, own = f"{ADAPTER}/", f"{self.seat.adapter}/"
        named = {f"{own}{name.removeprefix(prefix)}": tensor for name, tensor in state.items()}
        self.optimizer.load_whole_state(named, self.own)

    def _prune(self) -> None:
        """What cannot be deleted now costs room and nothing else: the next checkpoint tries again."""
        storage = self.spec.storage
        try:
            prune(self.request.run_dir, storage.keep_best, storage.keep_latest, self.request.fence)
        except StorageError as error:
            self._emit("warning", message=f"older checkpoints were not all deleted: {error}")

    def batches(self) -> Iterator[StepBatch]:
        """This rank's part of each step that is to come."""
        training, plan = self.spec.training, self.plan
        return steps(
            len(self.examples),
            epochs=training.num_epochs,
            max_steps=training.max_steps,
            global_batch_size=plan.global_batch_size,
            micro_batch_size=plan.micro_batch_size,
            world_size=self.group.size,
            rank=self.group.rank,
            seed=training.seed,
            start_step=self.position.step,
            lengths=[len(row.input_ids) for row in self.examples] if self.capacity else None,
            capacity=self.capacity or 0,
        )

    def _update(self, step: int) -> float:
        """Sums the gradients over the ranks and steps; returns their norm, which is not finite where nothing was
        changed."""
        with self.seat.serving():
            extra = self.model.extra_loss()  # type: ignore[operator]
        if extra is not None:  # of the model, not of its rows: each rank brings its part
            (extra * (self.scale.value / self.group.size)).backward()
        self.optimizer.reduce(keep_whole=self.controllers.are_there, names=self.own)
        scale = self.scale.value
        if self.controllers.are_there:
            self.controllers.after_backward(step, scale)
            scale = 1.0
        norm = self.optimizer.step(scale, self.own)[self.seat.adapter]
        if math.isfinite(norm):
            self.controllers.after_step(step)
        return norm

    def _advance(self, batch: StepBatch, outcome: StepOutcome) -> None:
        self.position = replace(
            self.position,
            step=batch.step + 1,
            epoch=batch.epoch + 1,
            loss_sum=self.position.loss_sum + outcome.loss * outcome.target_tokens,
            target_tokens=self.position.target_tokens + outcome.target_tokens,
        )

    def _save_and_stop(self) -> None:
        self._emit("state", state="saving", message=f"stopping: checkpoint at step {self.position.step}")
        if self.position.step:
            self.save()
        raise Stopped

    def _not_finite(self, what: str, value: float, step: int) -> NotFiniteError:
        kept = (
            f"the last good checkpoint is at step {self.saved_step}"
            if self.saved_step
            else "there is no checkpoint yet"
        )
        lower = "Lower training.learning_rate"
        hint = (
            f"{lower}, or set precision: bf16."
            if self.scale.enabled
            else f"{lower} or look at the rows of this step."
        )
        return NotFiniteError(
            f"the {what} of step {step} is {value}: training stopped, and {kept}.",
            where=f"run {self.request.run_id}",
            hint=hint,
        )

    def _report(self, outcome: StepOutcome) -> None:
        step, rate = self.position.step, self._throughput.took(outcome.tokens)
        self._emit(
            "progress",
            step=step,
            total_steps=self.total_steps,
            epoch=self.position.epoch,
            loss=outcome.loss,
            learning_rate=learning_rate(step, self.total_steps, self.spec.training),
            grad_norm=outcome.grad_norm,
            tokens_per_s=rate.tokens_per_s,
            eta_s=rate.step_s * (self.total_steps - step),
        )

    def _emit(self, kind: str, **fields: Any) -> None:
        if self.reporter is not None and self.group.is_first:
            self.reporter.emit(kind, **fields)


@dataclass(frozen=True)
class Rate:
    """Smoothed speed."""

    tokens_per_s: float
    step_s: float


class Throughput:
    """Tokens a second and seconds a step, averaged with a half-life of about ten steps; pauses do not
    count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._since = clock, clock()
        self._tokens = self._seconds = self._steps = 0.0

    def took(self, tokens: float) -> Rate:
        """Notes that a step over `tokens` has just ended."""
        now = self._clock()
        fade = 0.93
        self._tokens = self._tokens * fade + tokens
        self._seconds = self._seconds * fade + (now - self._since)
        self._steps = self._steps * fade + 1
        self._since = now
        return Rate(self._tokens / max(self._seconds, 1e-9), self._seconds / self._steps)

    def pause_ended(self) -> None:
        """What happened since the last step was no training."""
        self._since = self._clock()


def _mixed(seed: int, step: int, rank: int) -> int:
    """A seed for torch's own generator that differs by step and rank; a run resumed at a step draws the
    same."""
    return (seed * 1_000_003 + step * 8_191 + rank) % 2**63
