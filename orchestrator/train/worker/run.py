"""One worker's whole run, from the base's weights to the final adapter: no Ray, any number of ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import objects
from orchestrator.errors import ModelError, TrainingError
from orchestrator.runner import TrainRequest
from orchestrator.spec.tasks import measured_metrics
from peft_dist.errors import BaseModelError, PeftDistError
from peft_dist.optim import Hyper

from ..events import Told
from ..group import Group
from ..rows.batches import num_steps
from ..rows.task_ids import task_numbers
from ..task_file import check_labels, read_task_file, write_task_file
from ..tasks import Batch, Row, task_class
from . import raw_tensors
from .checkpoint import (
    Checkpoint,
    Position,
    at_step,
    at_url,
    clean_folders,
    local_copy,
    named,
    newest_good,
    put_sealed,
    seal,
)
from .controllers import without_controllers
from .data import Examples
from .evaluate import Evaluation, Stopped, compare, measure_base
from .ground import Emit, Ground
from .loop import Training
from .model import bare_model, build_model, seat_on
from .seat import Seat
from .sequences import check_apart
from .starts import ROWS


@dataclass(frozen=True)
class RunEnd:
    """What a worker returns: plain numbers and strings. `is_stopped`: a stop was asked for, `steps` are
    saved."""

    steps: int
    is_stopped: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    adapter_dir: str = ""
    train_rows: str = ""
    eval_rows: str = ""
    question: str | None = None


def train(
    request: TrainRequest, *, device: str = "cpu", precision: str = "fp32", reporter: Told | None = None
) -> RunEnd:
    """Trains on this rank, from the last good checkpoint where there is one.

    Args:
        device, precision: what `orchestrator.devices` decided for this rank.
        reporter: events and the request to stop; rank 0's are told to the driver.

    Raises:
        RaypeftError: DataError, ModelError, SpecError, StorageError or TrainingError, with its message for
        users.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="raypeft-") as scratch:
            group = Group(device)
            ground = Ground(request, group, precision, telling(reporter, group))
            return Run(request, ground, reporter, Path(scratch)).finish()
    except BaseModelError as error:
        raise ModelError(str(error), where="model.base_model") from error
    except PeftDistError as error:
        raise TrainingError(str(error), where=f"run {request.run_id}") from error


def question_of(rows: Sequence[Any]) -> str | None:
    """The question of the first row: its last user message, or its prompt; None for plain text and for rows of
    other tasks."""
    prompt = getattr(rows[0], "prompt", None) if rows else None
    if prompt is None:
        return None
    if isinstance(prompt, str):
        return prompt or None
    asked = [message["content"] for message in prompt if message["role"] == "user"]
    return asked[-1] if asked else None


def telling(reporter: Told | None, group: Group) -> Emit:
    """A way to tell events that only rank 0's are heard of."""

    def emit(kind: str, **fields: Any) -> None:
        if reporter is not None and group.is_first:
            reporter.emit(kind, **fields)

    return emit


class Run:
    """One run on this rank, from its newest checkpoint to its end.

    Args:
        ground: what it may share with others.
        scratch: a local directory of its own.
        adapter: its adapter's name on a base that others stand on too; None where it has the base for itself.
        from_checkpoint: URL of another run's checkpoint, to go on from where this one has none.

    Attributes:
        training: to be run to its last step before `conclude`.
    """

    def __init__(
        self,
        request: TrainRequest,
        ground: Ground,
        reporter: Told | None,
        scratch: Path,
        adapter: str | None = None,
        from_checkpoint: str | None = None,
    ) -> None:
        self.request, self.spec, self.group = request, request.spec, ground.group
        self.ground, self.reporter, self.scratch = ground, reporter, scratch
        self.tokenizer, self._emit = ground.tokenizer, telling(reporter, ground.group)
        group = ground.group
        self.examples: Examples = ground.examples_of(self.spec)
        kind = task_class(self.spec)
        if self._capacity and ground.model is None:
            check_apart(ground.base, [row.input_ids for row in self.examples.train[:50]], group.device)
        checkpoint = self._newest() or self._given(from_checkpoint)
        state = checkpoint.optimizer_state() if checkpoint else {}
        is_raw = raw_tensors.are_in(state)
        source = None if is_raw else self._source(checkpoint)
        self.seat = self._seat(adapter, source)
        if is_raw:
            raw_tensors.restore(self.seat, state)
        numbered = task_numbers(self.spec.adapter) is not None
        measured = kind(self.tokenizer, self.examples.facts, takes_task_ids=numbered)
        self.task = kind(
            self.tokenizer,
            self.examples.facts,
            takes_task_ids=numbered,
            method=self.seat.config,
        )
        self.evaluation = Evaluation(
            rows=self.examples.evaluation,
            task=measured,
            batch_size=request.plan.micro_batch_size,
            group=group,
            spec=self.spec.eval,
            metrics=measured_metrics(self.spec),
            is_sharded=ground.is_sharded,
            should_stop=lambda: reporter is not None and reporter.stop_requested,
            capacity=self._capacity,
        )
        self.training = self._training(checkpoint, state)

    def _seat(self, adapter: str | None, source: Path | None) -> Seat:
        request, ground, group, steps = self.request, self.ground, self.group, self._total_steps()
        if adapter is None:
            return Seat(build_model(request, ground.base, group, source, steps, self._samples))
        if ground.model is None:
            ground.model = bare_model(self.spec, ground.base)
        return seat_on(request, ground.model, adapter, group, source, steps, self._samples)

    @property
    def _capacity(self) -> int | None:
        """Tokens of a sequence that rows share, where they do."""
        return self.examples.report.sequence_len if self.spec.data.sample_packing else None

    def _samples(self) -> list[Batch]:
        """The first training rows, for starts that look at them."""
        task, size = (
            task_class(self.spec)(self.tokenizer, self.examples.facts),
            self.request.plan.micro_batch_size,
        )
        rows = self.examples.train[:ROWS]
        cut = (rows[at : at + size] for at in range(0, len(rows), size))
        return [task.collate(part, range(len(part))).to(self.group.device) for part in cut]

    def _total_steps(self) -> int:
        training = self.spec.training
        return num_steps(
            len(self.examples.train),
            epochs=training.num_epochs,
            max_steps=training.max_steps,
            global_batch_size=self.request.plan.global_batch_size,
        )

    def finish(self) -> RunEnd:
        """Trains, evaluates and leaves the final adapter in the run's folder."""
        training = self.training
        self.announce()
        try:
            training.run()
            return self.conclude()
        except Stopped:
            return RunEnd(steps=training.position.step, is_stopped=True)

    def announce(self) -> None:
        """Says from which step to which it trains."""
        training = self.training
        if training.position.step < training.total_steps:
            message = f"training from step {training.position.step} to {training.total_steps}"
            self._emit("state", state="training", message=message)

    def conclude(self) -> RunEnd:
        """After the last step: evaluates, and leaves the final adapter in the run's folder.

        Raises:
            Stopped: a stop was asked for; the checkpoint is there.
        """
        metrics = self._measure()
        self._emit("state", state="saving", message="writing the final adapter")
        final = self._save_final()
        return RunEnd(
            self.training.position.step,
            metrics=metrics,
            adapter_dir=final,
            train_rows=self._write_hashes("train_rows.txt", self.examples.train),
            eval_rows=self._write_hashes("eval_rows.txt", self.evaluation.used),
            question=question_of(self.evaluation.used),
        )

    def _training(self, checkpoint: Checkpoint | None, state: dict[str, Any]) -> Training:
        spec = self.spec.training
        optimizer, seat = self.ground.optimizer, self.seat
        hyper = Hyper(
            learning_rate=spec.learning_rate,
            optimizer=spec.optimizer,
            weight_decay=spec.weight_decay,
            max_grad_norm=spec.max_grad_norm,
        )
        optimizer.add(seat.adapter, seat.trained(), hyper)
        position = checkpoint.position if checkpoint else Position(step=0, epoch=0, seed=spec.seed)
        training = Training(
            self.request,
            seat,
            optimizer,
            self.task,
            self.examples.train,
            self.evaluation,
            self.group,
            position,
            save_adapter=self._save_adapter,
            precision=self.ground.precision,
            capacity=self._capacity,
            reporter=self.reporter,
        )
        if checkpoint is not None:
            training.load_optimizer_state(without_controllers(raw_tensors.without(state)))
        training.controllers.load_state(state)
        return training

    def _save_adapter(self, folder: str) -> None:
        self.seat.save(folder)
        if self.group.is_first:
            write_task_file(Path(folder), self.spec, self.examples.facts)

    def _newest(self) -> Checkpoint | None:
        """The checkpoint to go on from, chosen and verified by rank 0, read by all."""
        found = None
        if self.group.is_first:
            found = objects.persistently(
                lambda: newest_good(
                    self.request.run_dir, self.scratch, lambda text: self._emit("warning", message=text)
                )
            )
        step = int(self.group.first(found.position.step if found else 0))
        if step == 0:
            return None
        self._emit("state", state="starting", message=f"going on from the checkpoint at step {step}")
        return found or at_step(self.request.run_dir, step, self.scratch)

    def _given(self, url: str | None) -> Checkpoint | None:
        """Another run's checkpoint.

        Raises:
            ModelError: it is damaged.
        """
        return None if url is None else at_url(url, self.scratch)

    def _source(self, checkpoint: Checkpoint | None) -> Path | None:
        if checkpoint is not None:
            return checkpoint.adapter_dir
        if self.request.init_from is None:
            return None
        folder = local_copy(self.request.init_from, self.scratch / "init_from")
        check_labels(folder, self.examples.facts, f"adapter.init_from: {self.spec.adapter.init_from}")
        return folder

    def _measure(self) -> dict[str, float]:
        """All metrics of the run: the adapter's own, `base.*`, and those of the adapters to compare with."""
        position = self.training.position
        found = {"train_loss": position.loss_sum / max(1.0, position.target_tokens)}
        if not self.evaluation.used:
            return found
        self._emit("state", state="evaluating", message=self._evaluating())
        known = position.metrics.get("eval_loss") if position.evaluated_at == position.step else None
        with self.seat.active():
            found |= self.evaluation.measure(self.seat.model, known)
            found |= self._of_the_base()
            found |= compare(self.evaluation, self.seat.model, dict(self._comparable()), self.seat.adapter)
        self._emit("eval", step=position.step, metrics=found)
        return found

    def _of_the_base(self) -> dict[str, float]:
        """What an earlier run has measured of the bare base over the same rows is not measured again."""
        used = self.evaluation
        if self.ground.statistics:  # which this run has changed
            return measure_base(used, self.seat.model)
        key = (tuple(row.row_hash for row in used.used), used.batch_size, used.spec, used.metrics)
        if key not in self.ground.bare:
            self.ground.bare[key] = measure_base(used, self.seat.model)
        return self.ground.bare[key]

    def _comparable(self) -> Iterator[tuple[str, str]]:
        """Label and local folder of each adapter to compare with; one of other labels has no common measure."""
        for label, url in self.request.compare.items():
            folder = local_copy(url, self.scratch / f"compare-{label}")
            other = read_task_file(folder)
            if other is not None and other.facts.labels != self.examples.facts.labels:
                message = f"the {label} version tells other labels apart and is not compared with"
                self._emit("warning", message=message)
                continue
            yield label, str(folder)

    def _evaluating(self) -> str:
        models = ["the adapter", "the bare base", *self.request.compare]
        return f"evaluating on {len(self.evaluation.used)} rows: {', '.join(models)}"

    def _save_final(self) -> str:
        url = objects.join(self.request.run_dir, named("final", self.request.fence))
        folder = self.scratch / "final"
        self._save_adapter(str(folder))
        if self.group.is_first:
            seal(folder, step=self.training.position.step)
            put_sealed(folder, url)
            if (fence := self.request.fence) is not None:
                fence.check()
                clean_folders(self.request.run_dir, "final", fence)
        return url

    def _write_hashes(self, name: str, rows: Iterable[Row]) -> str:
        url = objects.join(self.request.run_dir, name)
        if self.group.is_first:
            content = "".join(f"{row.row_hash}\n" for row in rows).encode()
            objects.persistently(lambda: objects.write(url, content))
        return url
