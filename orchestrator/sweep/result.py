"""What a sweep came to, read from its run's folder: by `raypeft sweep show`, and after `raypeft run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator import objects, stored
from orchestrator.errors import RunError
from orchestrator.objects import exists, join
from orchestrator.spec.canonical import load_stored
from orchestrator.spec.sweep import SweepSpec
from orchestrator.spec.trials import count_trials
from orchestrator.store import RunRecord

from .trials import INTERRUPTED, RUNNING, Trial, best, ranked, read_trials

PAGE, IMPORTANCE = "report.html", "importance.json"


@dataclass(frozen=True)
class SweepResult:
    """A sweep's trials, the best first."""

    id: str
    state: str
    sweep: SweepSpec
    trials: tuple[Trial, ...]
    wanted: int
    """Trials that it begins at most."""
    adapter: str | None = None
    """`NAME@V` of the best one once it is registered."""
    page: str | None = None
    """Its report, a self-contained HTML file; None before it is written."""
    importance: Mapping[str, float] | None = None
    """Parameter -> share of the metric's variance; None before the report is written."""

    @property
    def best(self) -> Trial | None:
        """The best trial with a value."""
        return best(list(self.trials), self.sweep)

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        said = {
            "id": self.id,
            "state": self.state,
            "metric": self.sweep.metric,
            "mode": self.sweep.direction,
            "trials": [trial.to_dict() for trial in self.trials],
            "wanted": self.wanted,
            "best": self.best.number if self.best else None,
            "adapter": self.adapter,
            "report": self.page,
            "importance": dict(self.importance) if self.importance is not None else None,
        }
        return stored.finite(said)

    @classmethod
    def from_dict(cls, printed: Mapping[str, Any]) -> SweepResult:
        """What another process printed; of its `sweep` the metric and the mode."""
        shares = printed["importance"]
        return cls(
            printed["id"],
            printed["state"],
            SweepSpec(metric=printed["metric"], mode=printed["mode"], space={}),
            tuple(Trial.from_dict(each) for each in printed["trials"]),
            printed["wanted"],
            printed["adapter"],
            printed["report"],
            stored.numbers(shares) if shares is not None else None,
        )


def read_sweep(record: RunRecord) -> SweepResult:
    """The sweep of a stored run.

    Raises:
        RunError: its job has no sweep.
    """
    spec = load_stored(record.spec_yaml, join(record.url, "spec.yaml"))
    if spec.sweep is None:
        raise RunError(
            f"run '{record.id}' is of a job without a sweep.", hint=f"See it: raypeft status {record.id}"
        )
    page = join(record.url, PAGE)
    has_page = exists(page)
    return SweepResult(
        record.id,
        record.state,
        spec.sweep,
        tuple(ranked(_shown(read_trials(record.url), record), spec.sweep)),
        count_trials(spec.sweep),
        record.adapter,
        page if has_page else None,
        _importance(record.url) if has_page else None,
    )


def _shown(trials: list[Trial], record: RunRecord) -> list[Trial]:
    """The trials as they stand: none runs where nobody is at work on the sweep."""
    if not record.has_ended:
        return trials
    return [replace(each, state=INTERRUPTED) if each.state == RUNNING else each for each in trials]


def _importance(run_dir: str) -> dict[str, float] | None:
    url = join(run_dir, IMPORTANCE)
    return stored.numbers(stored.load(objects.read(url)[0], url)["shares"]) if exists(url) else None
