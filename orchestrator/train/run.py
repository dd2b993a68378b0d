"""One worker's whole run, from the base's weights to the final adapter: no Ray, any number of ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import objects
from orchestrator.chat_template import NO_TEMPLATE
from orchestrator.errors import ModelError, TrainingError
from orchestrator.runner import TrainRequest
from orchestrator.spec.tasks import measured_metrics
from peft_dist.errors import BaseModelError, PeftDistError
from peft_dist.loading import load_config
from peft_dist.optim import AdapterOptimizer, Hyper

from . import raw_tensors
from .batches import num_steps
from .checkpoint import (
    Checkpoint,
    Position,
    at_step,
    clean_folders,
    local_copy,
    named,
    newest_good,
    put_sealed,
    seal,
)
from .controllers import without_controllers
from .data import Examples, load_examples
from .evaluate import ADAPTER, Evaluation, Stopped, compare
from .events import Reporter
from .group import Group
from .inspection import max_positions
from .loop import Training
from .model import build_model, load_frozen_base, trainable
from .starts import ROWS
from .task_file import check_labels, read_task_file, write_task_file
from .task_ids import task_numbers
from .tasks import Batch, Row, task_class
from .tasks.task import pad_id
from .tokenizer import load_tokenizer


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
    request: TrainRequest, *, device: str = "cpu", precision: str = "fp32", reporter: Reporter | None = None
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
            return _Run(request, Group(device), precision, reporter, Path(scratch)).finish()
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


class _Run:
    """The parts of one run on this rank."""

    def __init__(
        self, request: TrainRequest, group: Group, precision: str, reporter: Reporter | None, scratch: Path
    ) -> None:
        self.request, self.spec, self.group = request, request.spec, group
        self.precision, self.reporter, self.scratch = precision, reporter, scratch
        self.tokenizer = load_tokenizer(self.spec.model)
        has_template = bool(self.tokenizer.chat_template)
        model = self.spec.model
        config = load_config(
            model.base_model, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        positions = max_positions(config.to_dict(), self.spec)
        self.examples: Examples = load_examples(self.spec, self.tokenizer, max_len=positions)
        self._emit("state", state="starting", message=self.examples.report.sentence())
        if not has_template and any(each.type == "chat" for each in self.spec.data.datasets):
            self._emit("warning", message=NO_TEMPLATE)
        kind = task_class(self.spec)
        labels = self.examples.facts.labels if kind.has_labels else None
        is_sharded = request.plan.zero_stage == 3 and group.is_distributed
        base = load_frozen_base(
            self.spec,
            precision,
            group.device,
            labels=labels,
            pad_token_id=pad_id(self.tokenizer),
            shards=request.plan.deepspeed if is_sharded else None,
        )
        checkpoint = self._newest()
        state = checkpoint.optimizer_state() if checkpoint else {}
        is_raw = raw_tensors.are_in(state)
        source = None if is_raw else self._source(checkpoint)
        self.model = build_model(request, base, group, source, self._total_steps(), self._samples)
        if is_raw:
            raw_tensors.restore(self.model, state)
        numbered = task_numbers(self.spec.adapter) is not None
        measured = kind(self.tokenizer, self.examples.facts, takes_task_ids=numbered)
        self.task = kind(
            self.tokenizer,
            self.examples.facts,
            takes_task_ids=numbered,
            method=self.model.peft_config[ADAPTER],  # type: ignore[union-attr,index]
        )
        self.evaluation = Evaluation(
            rows=self.examples.evaluation,
            task=measured,
            batch_size=request.plan.micro_batch_size,
            group=group,
            spec=self.spec.eval,
            metrics=measured_metrics(self.spec),
            is_sharded=is_sharded,
            should_stop=lambda: reporter is not None and reporter.stop_requested,
        )
        self.training = self._training(checkpoint, state)

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
        try:
            if training.position.step < training.total_steps:
                message = f"training from step {training.position.step} to {training.total_steps}"
                self._emit("state", state="training", message=message)
            training.run()
            metrics = self._measure()
        except Stopped:
            return RunEnd(steps=training.position.step, is_stopped=True)
        self._emit("state", state="saving", message="writing the final adapter")
        final = self._save_final()
        return RunEnd(
            training.position.step,
            metrics=metrics,
            adapter_dir=final,
            train_rows=self._write_hashes("train_rows.txt", self.examples.train),
            eval_rows=self._write_hashes("eval_rows.txt", self.evaluation.used),
            question=question_of(self.evaluation.used),
        )

    def _training(self, checkpoint: Checkpoint | None, state: dict[str, Any]) -> Training:
        spec = self.spec.training
        optimizer = AdapterOptimizer(stage=self.request.plan.zero_stage)  # type: ignore[arg-type]
        hyper = Hyper(
            learning_rate=spec.learning_rate,
            optimizer=spec.optimizer,
            weight_decay=spec.weight_decay,
            max_grad_norm=spec.max_grad_norm,
        )
        optimizer.add(ADAPTER, trainable(self.model), hyper)
        if checkpoint is not None:
            optimizer.load_whole_state(without_controllers(raw_tensors.without(state)))
        position = checkpoint.position if checkpoint else Position(step=0, epoch=0, seed=spec.seed)
        training = Training(
            self.request,
            self.model,
            optimizer,
            self.task,
            self.examples.train,
            self.evaluation,
            self.group,
            position,
            save_adapter=self._save_adapter,
            precision=self.precision,
            reporter=self.reporter,
        )
        training.controllers.load_state(state)
        return training

    def _save_adapter(self, folder: str) -> None:
        self.model.save_pretrained(folder)  # type: ignore[operator]
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
        found |= self.evaluation.measure(self.model, known)
        found |= compare(self.evaluation, self.model, dict(self._comparable()))
        self._emit("eval", step=position.step, metrics=found)
        return found

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

    def _emit(self, kind: str, **fields: Any) -> None:
        if self.reporter is not None and self.group.is_first:
            self.reporter.emit(kind, **fields)
