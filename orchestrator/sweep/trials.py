"""A sweep's trials as they are stored: each a run of its own below the sweep's, readable with no cluster up.

ROOT/SWEEP/trials/trial-007-HASH/      run.json, events, metrics, checkpoints/, final.F/
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from orchestrator import objects
from orchestrator.journal import read_lines
from orchestrator.objects import join
from orchestrator.runner import Event, TrainOutcome
from orchestrator.spec.space import Parameters
from orchestrator.spec.sweep import SweepSpec
from orchestrator.store import RunRecord, RunStore
from orchestrator.stored import numbers

FINISHED, STOPPED, FAILED, RUNNING = "finished", "stopped", "failed", "running"
INTERRUPTED = "interrupted"
"""What is shown of a running trial where its sweep is not under way; the same command goes on with it."""


@dataclass(frozen=True)
class Report:
    """What one evaluation of a trial measured."""

    step: int
    metrics: dict[str, float]
    t: float = 0.0
    """Unix seconds."""


@dataclass(frozen=True)
class Trial:
    """What is known of one trial."""

    number: int
    id: str
    url: str
    state: str
    """finished | stopped (by the scheduler or at the end of the budget) | failed | running | interrupted"""
    parameters: Parameters
    drawn: dict[str, Any] = field(default_factory=dict)
    reports: tuple[Report, ...] = ()
    steps: int = 0
    seconds: float = 0.0
    cause: str | None = None
    outcome: dict[str, Any] | None = None
    """Of a finished trial: the fields of `TrainOutcome`."""
    has_adapter: bool = False

    def value(self, metric: str) -> float:
        """The metric at the trial's last evaluation; not a number where it was never measured."""
        for report in reversed(self.reports):
            if metric in report.metrics:
                return report.metrics[metric]
        return math.nan

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "trial": self.number,
            "id": self.id,
            "state": self.state,
            "parameters": self.parameters,
            "metrics": self.reports[-1].metrics if self.reports else {},
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "cause": self.cause,
            "url": self.url,
            "has_adapter": self.has_adapter,
            "reports": [{"step": each.step, "t": each.t, "metrics": each.metrics} for each in self.reports],
        }

    @classmethod
    def from_dict(cls, printed: dict[str, Any]) -> Trial:
        """What another process printed."""
        reports = (Report(each["step"], numbers(each["metrics"]), each["t"]) for each in printed["reports"])
        kept = {name: printed[name] for name in ("id", "url", "state", "parameters", "steps", "seconds")}
        return cls(
            printed["trial"],
            **kept,
            reports=tuple(reports),
            cause=printed["cause"],
            has_adapter=printed["has_adapter"],
        )

    def train_outcome(self) -> TrainOutcome:
        """Of a finished trial."""
        assert self.outcome is not None
        return TrainOutcome(
            **{**self.outcome, "metrics": numbers(self.outcome["metrics"])}, first_step_s=math.nan
        )


def trials_url(run_dir: str) -> str:
    """Where the trials of a sweep's run are."""
    return join(run_dir, "trials")


def read_trials(run_dir: str) -> list[Trial]:
    """All trials of a sweep that have begun, by number."""
    records = RunStore(trials_url(run_dir)).list()
    found = [_trial(record) for record in records if "parameters" in record.facts]
    return sorted(found, key=lambda trial: trial.number)


def ranked(trials: list[Trial], sweep: SweepSpec) -> list[Trial]:
    """Trials from best to worst by their last evaluation; those that failed or have no value last."""
    sign = 1 if sweep.direction == "min" else -1

    def place(trial: Trial) -> tuple[float, ...]:
        value = trial.value(sweep.metric)
        is_known = not math.isnan(value)
        return (trial.state == FAILED, not is_known, sign * value if is_known else 0.0, trial.number)

    return sorted(trials, key=place)


def best(trials: list[Trial], sweep: SweepSpec) -> Trial | None:
    """The best of the trials that have ended with a value, be it before their last step."""
    ended = [
        each
        for each in trials
        if each.state in (FINISHED, STOPPED) and not math.isnan(each.value(sweep.metric))
    ]
    return ranked(ended, sweep)[0] if ended else None


def _trial(record: RunRecord) -> Trial:
    facts = record.facts
    state = facts.get("end") or RUNNING
    if record.state == "failed":
        state = FAILED
    reports = tuple(_reports(record))
    return Trial(
        number=facts["trial"],
        id=record.id,
        url=record.url,
        state=state,
        parameters=facts["parameters"],
        drawn=facts.get("drawn", {}),
        reports=reports,
        steps=max(facts.get("steps", 0), reports[-1].step if reports else 0),
        seconds=record.spent.seconds,
        cause=record.cause,
        outcome=facts.get("outcome"),
        has_adapter=any(_is_kept(name) for name in objects.list_(record.url)),
    )


def _reports(record: RunRecord) -> Iterator[Report]:
    """One for each evaluated step, with all that was measured there; read after a crash too, which may have left a step
    twice or a line unfinished."""
    found: dict[int, Report] = {}
    for line in read_lines(join(record.url, "metrics.jsonl")):
        with contextlib.suppress(ValueError):
            event: Event = json.loads(line)
            if event["event"] == "eval":
                metrics = {name: float(value) for name, value in event["metrics"].items()}
                known = found.get(event["step"])
                found[event["step"]] = Report(
                    event["step"], {**(known.metrics if known else {}), **metrics}, event.get("t", 0.0)
                )
    yield from (found[step] for step in sorted(found))


def prune(trials: list[Trial], sweep: SweepSpec, keep_best: int, keep_latest: int) -> list[Trial]:
    """Deletes the checkpoints and adapters of trials that are neither among the best nor among the latest; what was
    measured of them stays. Returns those of which something was deleted."""
    ended = [each for each in trials if each.state in (FINISHED, STOPPED) and each.has_adapter]
    stays = {each.number for each in ranked(ended, sweep)[:keep_best]}
    stays |= {each.number for each in sorted(ended, key=lambda each: each.number)[-keep_latest:]}
    gone = [
        each for each in trials if each.state != RUNNING and each.number not in stays and each.has_adapter
    ]
    for trial in gone:
        for name in objects.list_(trial.url):
            if _is_kept(name):
                objects.delete_tree(join(trial.url, name))
    return gone


def _is_kept(name: str) -> bool:
    """Whether an entry of a trial's folder holds tensors."""
    return name == "checkpoints" or name.split(".")[0] == "final"
