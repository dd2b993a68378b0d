"""A run's events as its trackers are told of them: numbers by step, where its version comes from, how it ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..runner import Event
from ..spec.canonical import resolved_values, resolved_yaml
from ..spec.job import JobSpec
from ..spec.trials import trial_job
from .session import TrackedRun, Tracking

_BEGUN = ("started", "resumed")
_ENDED = {"finished": "finished", "stopped": "finished", "failed": "failed"}
"""What a sweep says of a trial -> how trackers call it; one that the scheduler stopped was not killed."""
_PROGRESS = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "epoch")


class Story:
    """One run of one driver, for a job as for a trial of a sweep. Nothing is told before `begin`.

    Args:
        tracking: the driver's trackers.
        run_id: of the run; the same again goes on with it there.
        spec: the job; its keys, every default filled in, are the parameters.
        facts: what else is known when it begins, such as the hash of its data.
        parent: the run that it is nested in.
        name: as it is shown; the run's id where not given.
    """

    def __init__(
        self,
        tracking: Tracking,
        run_id: str,
        spec: JobSpec,
        facts: Mapping[str, str] | None = None,
        parent: TrackedRun | None = None,
        *,
        name: str | None = None,
    ) -> None:
        self.tracking, self._step = tracking, 0
        self._run_id, self._spec, self._facts = run_id, spec, facts
        self._parent, self._name = parent, name
        self.run: TrackedRun | None = None
        self._trials: dict[int, Story] = {}

    def begin(self) -> None:
        """There is something to tell: the run begins, or goes on."""
        if not self.tracking.targets or self.run is not None:
            return
        params = resolved_values(self._spec)
        self.run = self.tracking.run(
            self._run_id, name=self._name, params=params, tags=self._facts, parent=self._parent
        )
        self.run.text("job.yaml", resolved_yaml(self._spec))

    def take(self, event: Event) -> None:
        """Tells what an event says that trackers show: progress and evaluations, of a sweep's trial in a run of its
        own."""
        if self.run is None:
            return
        if isinstance(event.get("trial"), int):
            self._of_trial(event)
            return
        if event["event"] == "progress":
            self._step = max(self._step, int(event["step"]))
            self.run.metrics(int(event["step"]), {name: event[name] for name in _PROGRESS if name in event})
        elif event["event"] == "eval":
            self.run.metrics(int(event["step"]), event["metrics"])

    def registered(self, version: str, url: str, lineage: Mapping[str, Any]) -> None:
        """Tells which version came of it, and from what."""
        if self.run is None:
            return
        text = json.dumps(
            {name: value for name, value in lineage.items() if name != "resolved_spec"}, indent=1
        )
        named = {"version": version, "url": url, **_named(lineage)}
        self.run.tags({f"raypeft.{name}": value for name, value in named.items()})
        self.run.text("lineage.json", text)
        self.run.metrics(self._step, dict(lineage.get("metrics") or {}))

    def _of_trial(self, event: Event) -> None:
        number = event["trial"]
        if event["event"] == "trial" and event["state"] in _BEGUN and number not in self._trials:
            job = trial_job(self._spec, event["parameters"])
            facts = {"raypeft.sweep": self._run_id, "raypeft.trial": str(number)}
            self._trials[number] = Story(
                self.tracking, f"{self._run_id}/{event['id']}", job, facts, self.run, name=event["id"]
            )
            self._trials[number].begin()
        elif event["event"] == "trial" and event["state"] in _ENDED:
            if (trial := self._trials.pop(number, None)) is not None:
                trial.end(_ENDED[event["state"]])
        elif number in self._trials:
            self._trials[number].take({key: value for key, value in event.items() if key != "trial"})

    def end(self, status: str) -> None:
        """`finished`, `failed` or `killed`."""
        for trial in self._trials.values():
            trial.end("killed")
        self._trials.clear()
        if self.run is not None:
            self.run.end(status)


def _named(lineage: Mapping[str, Any]) -> dict[str, str]:
    """What of a lineage is searched for."""
    base = lineage.get("base") or {}
    found = {
        "base": base.get("name"),
        "parent": lineage.get("parent"),
        "data_hash": lineage.get("data_hash"),
        "spec_hash": lineage.get("spec_hash"),
        "gate_passed": lineage.get("gate_passed"),
        "best_trial": (lineage.get("sweep") or {}).get("trial"),
    }
    return {name: str(value) for name, value in found.items() if value is not None}
