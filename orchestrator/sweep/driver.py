"""One driver's part of a sweep: Tune says which trials begin and which go on, groups of workers train them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from orchestrator.errors import Interrupted, OutOfTimeError, RaypeftError, TrainingError
from orchestrator.plan.layout import Layout
from orchestrator.runner import Event, TrainOutcome, TrainRequest
from orchestrator.spec.job import JobSpec
from orchestrator.spec.space import Parameters, dimensions
from orchestrator.spec.trials import count_trials, trial_job
from peft_dist.lazy import lazy

from .account import MAX_DURATION, Account
from .ending import Ending
from .group_events import GroupEvents
from .groups import Groups
from .running import Running
from .trial_runs import TrialRun, TrialRuns
from .trials import RUNNING, Trial, read_trials

if TYPE_CHECKING:
    from orchestrator.sweep import schedule, search, tuning
else:
    # Ray Tune and Optuna: while the first group of workers starts
    schedule = lazy("orchestrator.sweep.schedule")
    search = lazy("orchestrator.sweep.search")
    tuning = lazy("orchestrator.sweep.tuning")


class Driver:
    """Takes up what earlier drivers of the sweep left.

    Args:
        request: of a job with a sweep.
        layout: where trials train.
        groups: of workers, none started.
        tell: an event of the sweep.
    """

    def __init__(
        self, request: TrainRequest, layout: Layout, groups: Groups, tell: Callable[..., None]
    ) -> None:
        assert request.spec.sweep is not None
        self._request, self._sweep, self._layout = request, request.spec.sweep, layout
        self._groups, self._tell = groups, tell
        self._space = dimensions(self._sweep.space)
        self._total = count_trials(self._sweep)
        self._known = {trial.number: trial for trial in read_trials(request.run_dir)}
        ended = sum(each.state != RUNNING for each in self._known.values())
        self._runs = TrialRuns(request)
        self._account = Account(request, groups, layout)
        self._group_events = GroupEvents(request, tell)
        self._running = Running(groups, tell, self._judge, total=self._total, ended=ended)
        self._ending = Ending(request, self._runs, groups, self._group_events, tell)
        self._tuning: tuning.Tuning | None = None

    def run(self, stop: threading.Event) -> TrainOutcome:
        """All trials that are left, then the best.

        Raises:
            Interrupted: `stop` was set; every trial has left with a checkpoint.
            OutOfTimeError: retry.max_duration is over, or a budget before any trial came to a value.
            TrainingError: a group failed for good, or no trial came to a value.
        """
        self._say_what_is_known()
        unfinished = [trial for trial in self._known.values() if trial.state == RUNNING]
        used_up = None
        if unfinished or len(self._known) < self._total:
            self._open_first(unfinished)
            used_up = self._tune(stop)
        return self._ending.outcome(used_up, stop)

    def close(self) -> None:
        """Ends workers and proxies, and keeps what was used up."""
        self._groups.close(5.0)
        if self._tuning is not None:
            self._tuning.close()
        self._running.close()
        self._account.keep()

    def _tune(self, stop: threading.Event) -> str | None:
        """Until no trial is left; the budget that was used up before."""
        recalled = [search.Suggestion(each.number, each.drawn) for each in self._known.values()]
        # those under way first: they have a place waiting
        recalled.sort(key=lambda each: (self._known[each.number].state != RUNNING, each.number))
        suggestions = search.Suggestions(self._sweep, recalled, self._request.spec.training.seed)
        self._tuning = tuning.Tuning(
            suggestions,
            schedule.scheduler(self._sweep),
            max_concurrent=self._layout.concurrent,
            on_start=self._start,
            on_end=lambda number, _: self._running.stop(number, "the scheduler"),
        )
        while not self._tuning.has_ended:
            if stop.is_set():
                self._interrupt(
                    Interrupted(
                        f"sweep '{self._request.run_id}' was stopped.",
                        hint="The same command goes on: finished trials are kept, others go on from their checkpoints.",
                    )
                )
            self._tuning.step()
            for event in self._groups.take():
                self._take(event)
            used_up = self._account.used_up()
            if used_up == MAX_DURATION:
                self._interrupt(
                    OutOfTimeError(
                        f"sweep '{self._request.run_id}' ended: retry.max_duration is over.",
                        hint="Run it again with --resume to go on.",
                    )
                )
            if used_up is not None:
                num = len(self._running)
                self._say(f"{used_up} is used up: {num} trials are stopped, the best until now is taken")
                suggestions.stop()
                self._running.stop_all(used_up)
                return used_up
        self._running.wait_for_leaving()
        return None

    def _start(self, number: int, config: dict[str, Any]) -> None:
        """Tune has begun a trial: what is known of it is told, and the rest trains."""
        before = self._known.get(number)
        reports = before.reports if before else ()
        has_ended = before is not None and before.state != RUNNING
        if number in self._running:  # its proxy died, and it did not
            reports, has_ended = self._running.told(number), False
        for count, each in enumerate(reports, start=1):
            is_last = has_ended and count == len(reports)
            self._judge(number, count, each.step, each.metrics, is_last=is_last, recalled=True)
        if has_ended and not reports:
            self._judge(number, 1, 0, {}, is_last=True)
        if has_ended or number in self._running:
            return
        drawn = {name: value for name, value in config.items() if name != tuning.TRIAL}
        parameters = search.parameters_of(self._space, drawn)
        job, broken = self._job(parameters)
        run = self._runs.open(number, job, is_known=before is not None)
        trial = TrialRun(number, run, parameters, drawn, reports)
        request = self._runs.request(run, job)
        self._running.enter(trial, request, "resumed" if before else "started", broken)

    def _job(self, parameters: Parameters) -> tuple[JobSpec, str | None]:
        """A trial's job, and why there is none: what was drawn together breaks a rule that no combination broke by
        which the space was tried. Its run is then that of the job around it."""
        try:
            return trial_job(self._request.spec, parameters), None
        except ValueError as error:
            return trial_job(self._request.spec, {}), str(error)

    def _judge(
        self,
        number: int,
        count: int,
        step: int,
        metrics: Mapping[str, float],
        *,
        is_last: bool = False,
        recalled: bool = False,
    ) -> None:
        """Tells Tune of a trial's evaluation."""
        assert self._tuning is not None
        told = {
            search.VALUE: metrics.get(self._sweep.metric, math.nan),
            search.EVALUATIONS: count,
            "step": step,
            schedule.RECALLED: recalled,
        }
        self._tuning.tell(number, {**told, "done": True} if is_last else told)

    def _take(self, event: Event) -> None:
        if event.get("trial") is not None:
            self._running.take(event)
            if self._running.all_step:
                self._ending.prepare()
            return
        try:
            self._group_events.take(event)
        except TrainingError as error:
            self._interrupt(error)

    def _interrupt(self, error: RaypeftError) -> NoReturn:
        """Has every trial save a checkpoint and leave, and raises."""
        self._running.interrupt_all()
        raise error

    def _open_first(self, unfinished: list[Trial]) -> None:
        """Starts a group while Ray Tune is imported."""
        if unfinished:
            parameters = unfinished[0].parameters
        else:
            drawn = {each.name: 0 if each.is_list else each.witnesses()[0] for each in self._space}
            parameters = search.parameters_of(self._space, drawn)
        self._groups.open(self._runs.group_request(trial_job(self._request.spec, parameters)))

    def _say_what_is_known(self) -> None:
        layout = self._layout
        said = f"{self._total} trials, {layout.concurrent} at once on {layout.groups} base(s)"
        if self._known:
            going = sum(each.state == RUNNING for each in self._known.values())
            said += f"; {len(self._known) - going} have ended before, {going} go on"
        self._say(said)

    def _say(self, message: str) -> None:
        self._tell("state", state="training", message=message)
