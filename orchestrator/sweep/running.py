"""The trials under way in a sweep's driver: what groups say of them is kept and told on, until each has ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from orchestrator.errors import RaypeftError
from orchestrator.runner import Event, TrainRequest

from .groups import Groups
from .trial_runs import TrialRun, outcome_of
from .trials import FAILED, FINISHED, STOPPED, Report

LEAVE_S = 25.0
"""How long trials may take to save a checkpoint when they are to leave."""
_ENDS = ("left", "failed", "finished")


class Judge(Protocol):
    """Who decides which trials go on."""

    def __call__(
        self, number: int, count: int, step: int, metrics: Mapping[str, float], *, is_last: bool = False
    ) -> None:
        """Learns of a trial's evaluation, the `count`-th of it."""


class Running:
    """Trials that stand on groups or wait there for a place.

    Args:
        tell: an event of the sweep.
        judge: learns of each evaluation.
        total: trials of the sweep. ended: those of them that had ended before this driver.
    """

    def __init__(
        self, groups: Groups, tell: Callable[..., None], judge: Judge, *, total: int, ended: int
    ) -> None:
        self._groups, self._tell, self._judge = groups, tell, judge
        self._total, self._ended = total, ended
        self._trials: dict[int, TrialRun] = {}
        self._waits: set[int] = set()
        """Those that have not taken a step here."""
        self._leaving: dict[str, tuple[TrialRun, Callable[[TrialRun, Event], None]]] = {}

    def __len__(self) -> int:
        return len(self._trials)

    def __contains__(self, number: int) -> bool:
        return number in self._trials

    @property
    def all_step(self) -> bool:
        """Whether every trial of the sweep has begun and none waits for its first step here."""
        return self._ended + len(self._trials) + len(self._leaving) >= self._total and not self._waits

    def told(self, number: int) -> tuple[Report, ...]:
        """What the judge knows of a trial."""
        return self._trials[number].told()

    def enter(self, trial: TrialRun, request: TrainRequest, how: str, broken: str | None = None) -> None:
        """Has a trial train, now or as soon as there is a place.

        Args:
            how: started | resumed, as it is told.
            broken: why it cannot: it fails at once.
        """
        self._trials[trial.number] = trial
        self._waits.add(trial.number)
        trial.begin()
        self._tell_trial(trial, how, parameters=trial.parameters)
        if broken is not None:
            self._failed(trial, broken)
        else:
            self._groups.enter(str(trial.number), request)

    def stop(self, number: int, by: str) -> None:
        """Has a trial leave for good; one that is not under way is passed over."""
        if number in self._trials:
            self._leave(number, lambda trial, event: self._stopped(trial, by, event))

    def stop_all(self, by: str) -> None:
        """Has every trial leave for good, and waits for it."""
        self._leave_all(lambda trial, event: self._stopped(trial, by, event))

    def interrupt_all(self) -> None:
        """Has every trial save a checkpoint to go on from and leave, and waits for it."""
        self._leave_all(lambda trial, event: trial.end("interrupted", f"interrupted at step {trial.step}"))

    def wait_for_leaving(self) -> None:
        """Until every trial that was asked to leave has, or could have."""
        deadline = time.monotonic() + LEAVE_S
        while self._leaving and time.monotonic() < deadline:
            for event in self._groups.take():
                if event.get("trial") in self._leaving:
                    self._of_leaving(event)
                if event["event"] == "group_failed":
                    deadline = min(deadline, time.monotonic() + 1)
            time.sleep(0.02)
        for name in list(self._leaving):
            trial, end = self._leaving.pop(name)
            end(trial, {})

    def take(self, event: Event) -> None:
        """What a group says of a trial."""
        kind, name = event["event"], event["trial"]
        if name in self._leaving:
            self._of_leaving(event)
            return
        trial = self._trials.get(int(name))
        if trial is None:
            return
        event = {**event, "trial": trial.number}
        if kind == "progress":
            trial.step, trial.total_steps = event["step"], event["total_steps"]
            self._waits.discard(trial.number)
            self._keep(trial, event)
        elif kind == "eval":
            self._keep(trial, event)
            if event["step"] != trial.total_steps and event["step"] > trial.told_step:
                trial.reported, trial.told_step = trial.reported + 1, event["step"]
                self._judge(trial.number, trial.reported, event["step"], event["metrics"])
        elif kind in ("state", "checkpoint", "warning"):
            trial.run.append_event(event)
            if kind == "warning":
                self._tell(kind, trial=trial.number, message=f"trial {trial.number}: {event['message']}")
        elif kind == "finished":
            self._finished(trial, event["end"])
        elif kind == "failed":
            self._failed(trial, event["cause"])

    def close(self) -> None:
        """Lets go of those whose groups are gone; they can go on."""
        for trial in list(self._trials.values()):
            with contextlib.suppress(RaypeftError):
                trial.end("interrupted", "the sweep ended before it")

    def _keep(self, trial: TrialRun, event: Event) -> None:
        trial.run.append_metrics(event)
        self._tell(
            event["event"], **{name: value for name, value in event.items() if name not in ("event", "t")}
        )

    def _leave(self, number: int, end: Callable[[TrialRun, Event], None]) -> None:
        trial = self._trials.pop(number)
        self._leaving[str(number)] = (trial, end)
        self._groups.leave(str(number))

    def _of_leaving(self, event: Event) -> None:
        """What a trial that was asked to leave still does: what it measures is kept, and nobody judges it by that."""
        trial, end = self._leaving[event["trial"]]
        if event["event"] in _ENDS:
            del self._leaving[event["trial"]]
            end(trial, event)
        elif event["event"] in ("progress", "eval"):
            trial.step = event["step"]
            self._keep(trial, {**event, "trial": trial.number})

    def _leave_all(self, end: Callable[[TrialRun, Event], None]) -> None:
        for number in list(self._trials):
            self._leave(number, end)
        self.wait_for_leaving()

    def _stopped(self, trial: TrialRun, by: str, event: Event) -> None:
        trial.step = max(trial.step, event.get("step", 0))
        trial.end("done", f"stopped by {by} at step {trial.step}", end=STOPPED)
        self._tell_trial(trial, STOPPED, cause=by)

    def _finished(self, trial: TrialRun, end: Mapping[str, Any]) -> None:
        del self._trials[trial.number]
        trial.step = end["steps"]
        trial.end(
            "done",
            f"finished after {end['steps']} steps",
            end=FINISHED,
            outcome=outcome_of(end),
            metrics=end["metrics"],
        )
        self._tell_trial(trial, FINISHED, metrics=end["metrics"])
        self._judge(trial.number, trial.reported + 1, trial.step, end["metrics"], is_last=True)

    def _failed(self, trial: TrialRun, cause: str) -> None:
        """One fails alone."""
        del self._trials[trial.number]
        trial.end("failed", "failed", cause=cause)
        self._tell_trial(trial, FAILED, cause=cause)
        self._judge(trial.number, trial.reported + 1, trial.step, {}, is_last=True)

    def _tell_trial(self, trial: TrialRun, state: str, **fields: Any) -> None:
        if state in (FINISHED, STOPPED, FAILED):
            self._ended += 1
            self._waits.discard(trial.number)
        counts = {"ended": self._ended, "trials": self._total}
        self._tell(
            "trial", trial=trial.number, id=trial.run.id, state=state, step=trial.step, **counts, **fields
        )
