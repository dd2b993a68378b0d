"""What a sweep comes to: the best trial measured whole, the adapters of others taken away, and a report of all."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.errors import Interrupted, OutOfTimeError, RaypeftError, TrainingError
from orchestrator.runner import TrainOutcome, TrainRequest
from orchestrator.spec.trials import trial_job
from orchestrator.store import Run
from peft_dist.lazy import lazy

from .group_events import GroupEvents
from .groups import Groups
from .trial_runs import TrialRuns, outcome_of
from .trials import FINISHED, STOPPED, Trial, best, prune, read_trials

if TYPE_CHECKING:
    from orchestrator.sweep import report
else:
    report = lazy("orchestrator.sweep.report")  # matplotlib: imported while trials train


class Ending:
    """Of one sweep, once no trial is under way.

    Args:
        request: the sweep's own.
        groups: on which the best trial is measured.
        group_events: takes what groups say meanwhile.
        tell: an event of the sweep.
    """

    def __init__(
        self,
        request: TrainRequest,
        runs: TrialRuns,
        groups: Groups,
        group_events: GroupEvents,
        tell: Callable[..., None],
    ) -> None:
        assert request.spec.sweep is not None
        self._request, self._sweep = request, request.spec.sweep
        self._runs, self._groups, self._group_events = runs, groups, group_events
        self._tell = tell
        self._is_prepared = False

    def prepare(self) -> None:
        """Imports what the report takes, beside all else: seconds of this process's time, which neither a trial's place
        nor the end of the last one waits for."""
        if not self._is_prepared:
            self._is_prepared = True
            threading.Thread(target=getattr, args=(report, "write_report"), daemon=True).start()

    def outcome(self, used_up: str | None, stop: threading.Event) -> TrainOutcome:
        """The best trial, whole: chosen, measured beside production where a gate asks, the others pruned.

        Args:
            used_up: the budget that ended the sweep early.

        Raises:
            Interrupted: `stop` was set while the best was measured.
            OutOfTimeError: no trial came to a value before the budget was used up.
            TrainingError: no trial came to a value.
        """
        trials = read_trials(self._request.run_dir)
        chosen = best(trials, self._sweep)
        if chosen is None:
            raise self._nothing(trials, used_up)
        if chosen.state != FINISHED or self._request.compare:
            chosen = self._complete(chosen, stop)
        self._prune()
        write_report(self._request, self._tell)
        value = chosen.value(self._sweep.metric)
        self._tell(
            "best", trial=chosen.number, parameters=chosen.parameters, metric=self._sweep.metric, value=value
        )
        origin = {
            "sweep": self._request.run_id,
            "trial": chosen.number,
            "parameters": chosen.parameters,
            "trials": len(trials),
        }
        job = trial_job(self._request.spec, chosen.parameters)
        return replace(chosen.train_outcome(), spec=job, origin=origin)

    def _nothing(self, trials: list[Trial], used_up: str | None) -> RaypeftError:
        if used_up is not None:
            return OutOfTimeError(
                f"{used_up} was used up before any of {len(trials)} trials was evaluated.",
                where=used_up,
                hint="Raise it and run the same command with --resume.",
            )
        causes = [each.cause for each in trials if each.cause]
        why = f" The first: {causes[0]}" if causes else ""
        return TrainingError(
            f"none of {len(trials)} trials came to a value of {self._sweep.metric}.{why}",
            where=f"sweep {self._request.run_id}",
            hint=f"See them: raypeft sweep show {self._request.run_id}",
        )

    def _complete(self, chosen: Trial, stop: threading.Event) -> Trial:
        """Measures a trial whole, and writes its final adapter where it was stopped early: no step is taken."""
        job = trial_job(self._request.spec, chosen.parameters)
        run = self._runs.open(chosen.number, job)
        request = replace(self._runs.request(run, job), compare=self._request.compare)
        if chosen.state == STOPPED:
            training = job.training.model_copy(update={"max_steps": max(1, chosen.steps)})
            request = replace(request, spec=job.model_copy(update={"training": training}))
            self._say(
                f"trial {chosen.number}, the best, was stopped at step {chosen.steps}: it is measured as it stands"
            )
        with contextlib.closing(run):
            self._groups.enter(str(chosen.number), request)
            end = self._wait_for(str(chosen.number), run, stop)
            outcome = outcome_of(end)
            run.set_state(
                "done",
                message=f"measured after {end['steps']} steps",
                end=chosen.state,
                steps=end["steps"],
                outcome=outcome,
                metrics=end["metrics"],
            )
        return replace(chosen, outcome=outcome)

    def _wait_for(self, name: str, run: Run, stop: threading.Event) -> Mapping[str, Any]:
        while not stop.is_set():
            for event in self._groups.take():
                if event.get("trial") != name:
                    if event.get("trial") is None:
                        self._group_events.take(event)
                elif event["event"] == "finished":
                    return event["end"]
                elif event["event"] == "failed":
                    raise TrainingError(event["cause"], where=f"trial {name}")
                elif event["event"] == "eval":
                    run.append_metrics({**event, "trial": int(name)})
            time.sleep(0.02)
        raise Interrupted(
            f"sweep '{self._request.run_id}' was stopped while its best trial was measured.",
            hint="The same command goes on: every trial is kept.",
        )

    def _prune(self) -> None:
        storage = self._request.spec.storage
        trials = read_trials(self._request.run_dir)
        gone = prune(trials, self._sweep, storage.keep_best, storage.keep_latest)
        if gone:
            self._say(
                f"the adapters of {len(gone)} trials were deleted (storage.keep_best, storage.keep_latest)"
            )

    def _say(self, message: str) -> None:
        self._tell("state", state="training", message=message)


def write_report(request: TrainRequest, tell: Callable[..., None]) -> None:
    """Plots and a page of what trials there are, whether or not they have ended; nothing where none has begun. Where
    that fails a warning is all that comes of it: the trials are worth more than their pictures."""
    assert request.spec.sweep is not None
    try:
        trials = read_trials(request.run_dir)
        if not trials:
            return
        files = report.write_report(request.run_dir, request.run_id, request.spec.sweep, trials)
    except Exception as error:
        tell("warning", message=f"the plots were not written: {error}")
    else:
        tell("report", **files)
