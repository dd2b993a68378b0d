"""Runs that share one base in this process: each takes its own steps, with its own adapter, optimizer and fate.

A round is one optimizer step of each run. All that a run does, beside the forward and backward that it may share, is
what it does alone: `loop.Training`, one per run. Every rank of a group calls the same methods in the same order.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from orchestrator.errors import NotFiniteError
from orchestrator.runner import TrainRequest
from orchestrator.spec.sharing import changes_base

from ..faults import is_broken_link, is_out_of_memory
from ..packing import Packing
from ..tasks import Task
from . import joint
from .evaluate import Stopped
from .ground import Ground
from .loop import Ready
from .pace import Kind, Mode, Pace
from .run import Run, RunEnd
from .trial import LeavesAlone, Trial


@dataclass(frozen=True)
class Failed:
    """Why something went wrong on some rank, known to all."""

    kind: Literal["not_finite", "out_of_memory", "error"]
    error: str
    """The name of its class."""
    cause: str


class Pack:
    """Runs on one base.

    Args:
        packing: how rounds run; who enters, and when, the caller says.
        tell: events of the pack as a whole.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        ground: Ground,
        packing: Packing = Packing(),
        tell: Callable[..., None] = lambda kind, **fields: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.ground, self.group, self.way = ground, ground.group, packing.way
        self.trials: dict[str, Trial] = {}
        self._tell, self._clock, self._pace = tell, clock, Pace()
        self._most = packing.joined or 2**31
        self._apart: dict[Kind, str] = {}
        """Kinds of rounds that cannot run together, and why."""
        self._said: tuple[str, ...] = ()

    def enter(
        self, name: str, request: TrainRequest, told: LeavesAlone, from_checkpoint: str | None = None
    ) -> bool:
        """Puts a run on the base, from its newest checkpoint where there is one; False where that failed, which was
        told.

        Args:
            name: without dots; the adapter's on the base is made of it, and what is said of it calls it so.
            from_checkpoint: URL of another run's, to go on from where this one has none.

        Raises:
            ValueError: the pack has a run of this name.
        """
        if name in self.trials:
            raise ValueError(f"the pack has a run {name!r} already")
        began = self._clock()
        adapter = f"trial-{name}"
        scratch = tempfile.TemporaryDirectory(prefix="raypeft-")
        made: list[Trial] = []

        def start() -> None:
            self.ground.check(request.spec, len(self.trials))
            self.ground.taken = changes_base(request.spec) or ""
            # what changes the base has it for itself, as a run alone has
            own = None if self.ground.taken else adapter
            run = Run(request, self.ground, told, Path(scratch.name), own, from_checkpoint)
            run.announce()
            run.training.rehearse()
            made.append(Trial(name, run, told, scratch))

        failed = self._agreed(start)
        if failed is not None:
            self._free(adapter)
            scratch.cleanup()
            self._tell_failure(told, failed, step=0, saved=0)
            return False
        trial = self.trials[name] = made[0]
        told.emit("entered", step=trial.training.position.step, seconds=self._clock() - began)
        if trial.is_done:
            self._conclude(trial)
        return True

    def leave(self, name: str, saves: bool = True) -> None:
        """Ends a run between two steps, its checkpoint written unless `saves` says otherwise, and frees its place.
        Nothing where there is none of this name."""
        trial = self.trials.get(name)
        if trial is None:
            return

        def stop() -> None:
            if saves and trial.training.position.step:
                trial.training.save()

        failed = self._agreed(stop)
        if failed is not None:
            self._fail(trial, failed)
        else:
            self._left(trial)

    def round(self) -> None:
        """One optimizer step of each run; those that end, end alone."""
        self._let_go()
        trials = list(self.trials.values())
        if not trials:
            return
        for trial in trials:
            trial.advance()
        # what was measured of about as many runs of these kinds holds when one leaves
        kind = Kind(tuple(sorted({trial.facts() for trial in trials})), len(trials).bit_length())
        mode, why = self._mode(trials, kind)
        self._say(mode, why, trials)
        measures = mode if self.way == "auto" and len(trials) > 1 and not why else None
        seconds = tokens = 0.0
        for group in _cut(trials, self._most if mode == "together" else 1):
            found = self._step(group, kind, is_timed=measures is not None and self._pace.is_measuring(kind))
            seconds, tokens = seconds + found[0], tokens + found[1]
        if measures and tokens:
            self._pace.took(kind, measures, self.group.sum([seconds])[0] / tokens)

    # --- a round

    def _mode(self, trials: Sequence[Trial], kind: Kind) -> tuple[Mode, str]:
        """How this round runs, and why it cannot be otherwise; empty where it can."""
        if len(trials) == 1 or self.way == "turns":
            return "turns", ""
        if self._most == 1:
            return "turns", "there is memory for one run in a forward"
        model = self.ground.model
        assert model is not None
        reasons = (joint.cannot_join(trial.run.task, model) for trial in trials)
        why = self._apart.get(kind) or next((reason for reason in reasons if reason), None)
        if why:
            return "turns", why
        return ("together" if self.way == "together" else self._pace.mode(kind)), ""

    def _step(self, trials: Sequence[Trial], kind: Kind, is_timed: bool) -> tuple[float, float]:
        """One step of each of these runs, by one forward and backward where they are several; (seconds of forwards
        and backwards on this rank, tokens)."""
        if len(trials) == 1:
            return self._alone(trials[0], is_timed)
        began = self._now(is_timed)
        ready: list[Ready] = []
        losses: list[float] = []

        def run() -> None:
            ready.extend(trial.training.prepare(trial.batch) for trial in trials)
            parts = [
                joint.Part(trial.adapter, trial.run.task, each)
                for trial, each in zip(trials, ready, strict=True)
            ]
            losses.extend(joint.backward(trials[0].run.seat.model, parts))

        failed = self._agreed(run)
        if failed is None:
            seconds = self._now(is_timed) - began
            for trial, each, loss in zip(trials, ready, losses, strict=True):
                self._complete(trial, each, loss)
            return seconds, sum(each.tokens for each in ready)
        self._undo(trials)
        if failed.kind == "out_of_memory":
            self._most = max(1, len(trials) // 2)
            self._tell("warning", message=f"{len(trials)} runs did not fit in one forward; now {self._most}")
        else:
            self._apart[kind] = failed.cause
        self._apart_from_now(trials, kind, self._most if failed.kind == "out_of_memory" else 1)
        return 0.0, 0.0

    def _apart_from_now(self, trials: Sequence[Trial], kind: Kind, most: int) -> None:
        """The step of runs that could not take it together, in smaller groups; a group before may have shown that
        they must be smaller yet."""
        for part in _cut(trials, most):
            if len(part) > self._most:
                self._apart_from_now(part, kind, self._most)
            else:
                self._step(part, kind, is_timed=False)

    def _alone(self, trial: Trial, is_timed: bool) -> tuple[float, float]:
        training = trial.training
        while True:
            began = self._now(is_timed)
            made: list[tuple[Ready, float]] = []

            def run(made: list[tuple[Ready, float]] = made) -> None:
                ready = training.prepare(trial.batch)
                made.append((ready, training.task.backward(ready.step, ready.batches)))

            failed = self._agreed(run)
            if failed is None:
                ready, loss = made[0]
                seconds = self._now(is_timed) - began
                self._complete(trial, ready, loss)
                return seconds, ready.tokens
            self._undo([trial])
            if failed.kind != "out_of_memory" or not trial.halve():
                self._fail(trial, failed)
                return 0.0, 0.0

    def _complete(self, trial: Trial, ready: Ready, loss: float) -> None:
        training = trial.training
        try:
            failed = self._agreed(lambda: training.took(trial.batch, training.complete(ready, loss)))
        except Stopped:
            self._left(trial)
            return
        self.ground.optimizer.zero_grad([trial.adapter])  # no memory of it while others step
        if failed is not None:
            self._fail(trial, failed)
        elif trial.is_done:
            self._conclude(trial)

    def _conclude(self, trial: Trial) -> None:
        ends: list[RunEnd] = []
        try:
            failed = self._agreed(lambda: ends.append(trial.run.conclude()))
        except Stopped:
            self._left(trial)
            return
        if failed is not None:
            self._fail(trial, failed)
            return
        trial.told.emit("finished", end=asdict(ends[0]))
        self._forget(trial)

    def _let_go(self) -> None:
        """Runs that were asked to leave, on any rank, do."""
        trials = list(self.trials.values())
        asked = self.group.sum([float(trial.told.stop_requested) for trial in trials]) if trials else []
        for trial, flag in zip(trials, asked, strict=True):
            if flag:
                self.leave(trial.name, trial.told.saves)

    def _undo(self, trials: Iterable[Trial]) -> None:
        """No gradient of a step that is taken again, and no memory of what did not fit."""
        self.ground.optimizer.zero_grad([trial.adapter for trial in trials])
        self.ground.release_memory()

    def _now(self, is_timed: bool) -> float:
        if is_timed and self.group.device != "cpu":
            torch.cuda.synchronize()
        return self._clock()

    def _say(self, mode: Mode, why: str, trials: Sequence[Trial]) -> None:
        names = tuple(trial.name for trial in trials)
        if len(trials) > 1 and self._said != (mode, why, *names):
            self._said = (mode, why, *names)
            self._tell("pack", mode=mode, trials=list(names), reason=why)

    # --- ends

    def _left(self, trial: Trial) -> None:
        training = trial.training
        trial.told.emit(
            "left",
            step=training.position.step,
            checkpoint=training.saved_url if training.saved_step else None,
        )
        self._forget(trial)

    def _fail(self, trial: Trial, failed: Failed) -> None:
        training = trial.training
        self._tell_failure(trial.told, failed, step=training.position.step, saved=training.saved_step)
        self._forget(trial)

    def _tell_failure(self, told: LeavesAlone, failed: Failed, step: int, saved: int) -> None:
        told.emit(
            "failed",
            kind=failed.kind,
            error=failed.error,
            cause=failed.cause,
            step=step,
            last_checkpoint=saved or None,
        )

    def _forget(self, trial: Trial) -> None:
        del self.trials[trial.name]
        self._free(trial.adapter)
        trial.scratch.cleanup()

    def _free(self, adapter: str) -> None:
        """Takes an adapter off the base, as far as it got there."""
        optimizer, model = self.ground.optimizer, self.ground.model
        if adapter in optimizer.names:
            optimizer.remove(adapter)
        on_it: Any = model
        if model is not None and adapter in on_it.peft_config:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of another adapter that becomes active: rows name theirs
                on_it.delete_adapter(adapter)
            on_it.set_requires_grad(list(on_it.peft_config), True)

    @property
    def _gathers(self) -> bool:
        """Whether ranks wait for each other within a forward or backward: of a partitioned base, or by the task."""
        tasks = (type(trial.run.task) for trial in self.trials.values())
        apart = any(task.backward is not Task.backward for task in tasks)
        return self.ground.is_sharded or (apart and self.group.size > 1)

    def _agreed(self, act: Callable[[], object]) -> Failed | None:
        """Does it on this rank; what went wrong on any of them, the same on all.

        Raises:
            Stopped: as `act`, on every rank.
            Exception: the other ranks were lost, or wait where they cannot be told.
        """
        own: Failed | None = None
        try:
            act()
        except Stopped:
            raise
        except Exception as error:
            if is_broken_link(error) and self.group.size > 1:
                raise
            if is_out_of_memory(error) and self._gathers:
                raise  # of one rank: the others wait for it amid the model, and no word of it would reach them
            own = _failed(error)
        if not self.group.any(own is not None):
            return None
        return next(each for each in self.group.gather_plain(own) if each is not None)


def _failed(error: Exception) -> Failed:
    kind: Literal["not_finite", "out_of_memory", "error"] = "error"
    if isinstance(error, NotFiniteError):
        kind = "not_finite"
    elif is_out_of_memory(error):
        kind = "out_of_memory"
    return Failed(kind, type(error).__name__, str(error) or type(error).__name__)


def _cut(trials: Sequence[Trial], most: int) -> list[Sequence[Trial]]:
    """Groups of at most so many, as even as they can be."""
    count = -(-len(trials) // most)
    size = -(-len(trials) // count)
    return [trials[at : at + size] for at in range(0, len(trials), size)]
