"""The runs of a sweep's trials in its driver: opened by their numbers, what workers are asked to do in them, and what
becomes of one that is under way."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrator import objects
from orchestrator.objects import join
from orchestrator.plan.sweep import trial_plan
from orchestrator.runner import Spent, TrainRequest
from orchestrator.spec.job import JobSpec
from orchestrator.spec.space import Parameters
from orchestrator.spec.trials import saved_where_evaluated, shown
from orchestrator.store import Run, RunStore

from .trials import Report, trials_url


class TrialRuns:
    """Of one sweep.

    Args:
        request: the sweep's own.
    """

    def __init__(self, request: TrainRequest) -> None:
        self._request = request
        self._store = RunStore(trials_url(request.run_dir))

    def open(self, number: int, job: JobSpec, *, is_known: bool = True) -> Run:
        """A trial's run.

        Args:
            is_known: whether a driver said which trial it is; what one left that died before is taken away.
        """
        name = f"trial-{number:03d}"
        if not is_known:
            for record in self._store.named(name):
                objects.delete_tree(record.url)
        return self._store.open(name, job, self._request.data_hash)

    def request(self, run: Run, job: JobSpec) -> TrainRequest:
        """What a group is asked to train in a trial's run."""
        return replace(self._request_of(job, run.url, run.id), fence=run.fence)

    def group_request(self, job: JobSpec) -> TrainRequest:
        """What a group is started for before there is a trial: a base for trials like this job."""
        run_dir = join(self._request.run_dir, "groups")
        return self._request_of(job, run_dir, f"{self._request.run_id}-group")

    def _request_of(self, job: JobSpec, run_dir: str, run_id: str) -> TrainRequest:
        start = job.adapter.init_from
        return replace(
            self._request,
            spec=saved_where_evaluated(job),
            init_from=None if start is None else self._request.starts[start],
            plan=trial_plan(self._request.plan, job),
            run_dir=run_dir,
            run_id=run_id,
            compare={},
            fence=None,
            spent=Spent(),
        )


class TrialRun:
    """A trial under way in this driver.

    Args:
        run: its run, which is on the clock until `end`.
        parameters: the keys that it sets, of what was drawn.
        reports: evaluations that Tune was told before.
    """

    def __init__(
        self,
        number: int,
        run: Run,
        parameters: Parameters,
        drawn: Mapping[str, Any],
        reports: Sequence[Report],
    ) -> None:
        self.number, self.run, self.parameters = number, run, parameters
        self._drawn = dict(drawn)
        self.reported = len(reports)
        """Evaluations that Tune was told."""
        self.told_step = reports[-1].step if reports else 0
        """The step of the last of them."""
        self.step = self.told_step
        self.total_steps: int | None = None
        self._clock = contextlib.ExitStack()
        self._clock.enter_context(run.on_the_clock())

    def begin(self) -> None:
        """Says in its run which trial it is."""
        self.run.set_state(
            "starting",
            message=shown(self.parameters),
            trial=self.number,
            parameters=self.parameters,
            drawn=self._drawn,
        )

    def told(self) -> tuple[Report, ...]:
        """The evaluations that Tune was told, as the run keeps them."""
        metrics: dict[int, dict[str, float]] = {}
        for event in self.run.metrics():
            if event["event"] == "eval" and event["step"] <= self.told_step:
                metrics.setdefault(event["step"], {}).update(event["metrics"])
        return tuple(Report(step, metrics[step]) for step in sorted(metrics))

    def end(self, state: str, message: str, **facts: Any) -> None:
        """Keeps what it came to, and lets go of it."""
        self._clock.close()
        with contextlib.closing(self.run):
            self.run.set_state(state, message=message, steps=self.step, **facts)


def outcome_of(end: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `TrainOutcome` in what a group says of a trial that has finished."""
    return {name: value for name, value in end.items() if name != "is_stopped"}
