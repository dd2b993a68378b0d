"""A run on a base that it shares with others, taken one step at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from ..events import Told
from ..retries import smaller_micro_batch
from ..rows.batches import StepBatch
from .loop import Training
from .run import Run


class LeavesAlone(Told, Protocol):
    """What tells of one run among others."""

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is written when it leaves."""


class Trial:
    """One of the runs of a pack.

    Args:
        scratch: its local directory, which goes when it ends.

    Attributes:
        batch: this rank's part of the step that is to be taken.
    """

    batch: StepBatch

    def __init__(
        self, name: str, run: Run, told: LeavesAlone, scratch: tempfile.TemporaryDirectory[str]
    ) -> None:
        self.name, self.run, self.told, self.scratch = name, run, told, scratch
        self.training: Training = run.training
        self._steps: Iterator[StepBatch] = self.training.batches()

    @property
    def adapter(self) -> str:
        """Its adapter's name on the base."""
        return self.run.seat.adapter

    @property
    def is_done(self) -> bool:
        """Whether its last step is taken."""
        return self.training.position.step >= self.training.total_steps

    def advance(self) -> None:
        """Turns to the step after the last one that was taken."""
        self.batch = next(self._steps)

    def halve(self) -> bool:
        """Fewer rows a forward, as many a step, for the step that is to be taken and all after it; False where one row
        is all that a forward has."""
        plan, training = self.training.plan, self.training
        micro = smaller_micro_batch(plan.micro_batch_size)
        if micro == plan.micro_batch_size:
            return False
        training.plan = plan.at(plan.num_workers, micro)
        training.evaluation = replace(training.evaluation, batch_size=micro)
        message = f"a forward of {plan.micro_batch_size} rows did not fit: going on with {micro}"
        self.told.emit("warning", message=message)
        self._steps = training.batches()
        self.advance()
        return True

    def facts(self) -> tuple[str, int]:
        """What the speed of its steps depends on: the method and the rows of a forward."""
        return self.run.spec.adapter.type.lower(), self.training.plan.micro_batch_size
