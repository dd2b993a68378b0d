"""What each replica of an endpoint says of itself, in one small file of its own in the registry's storage.

ROOT/serving/ENDPOINT/replicas/ID.json      a replica's report, written every few seconds
ROOT/serving/ENDPOINT/audit                 every step of its rollouts: a journal, one JSON object a line
ROOT/serving/ENDPOINT/decider.json          who decides: a lease
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator import objects, stored
from orchestrator.errors import StorageError
from orchestrator.journal import Journal, read_lines
from orchestrator.objects import NotFound, join
from orchestrator.processes import ProcessId, is_alive

from ..rollout import Observed, Rollout
from ..shared_folder import SharedFolder
from .numbers import Agreement, Numbers

SILENT_S = 20.0
"""A replica that has said nothing for so long counts as gone."""
_FORGOTTEN_S = 24 * 3600.0


@dataclass(frozen=True)
class RolloutNumbers:
    """One rollout as one replica, or all of them, saw it."""

    candidate: Numbers = field(default_factory=Numbers)
    stable: Numbers = field(default_factory=Numbers)
    shadow: Agreement = field(default_factory=Agreement)

    def plus(self, other: RolloutNumbers) -> RolloutNumbers:
        """Those of both."""
        return RolloutNumbers(
            self.candidate.plus(other.candidate),
            self.stable.plus(other.stable),
            self.shadow.plus(other.shadow),
        )

    def metrics(self) -> dict[str, float]:
        """By the names of `spec.live_metrics`."""
        production = {f"production.{name}": value for name, value in self.stable.metrics().items()}
        return {**self.candidate.metrics(), **self.shadow.metrics(), **production}

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return {
            "candidate": self.candidate.to_dict(),
            "stable": self.stable.to_dict(),
            "shadow": self.shadow.to_dict(),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> RolloutNumbers:
        """Reads what `to_dict` wrote."""
        return cls(
            Numbers.from_dict(stored.get("candidate", {})),
            Numbers.from_dict(stored.get("stable", {})),
            Agreement.from_dict(stored.get("shadow", {})),
        )


@dataclass(frozen=True)
class Report:
    """One replica."""

    replica: str
    process: ProcessId
    at: float
    """When it was written, unix seconds."""
    since: float
    """When the replica began to answer, unix seconds."""
    states: dict[str, str] = field(default_factory=dict)
    """`name@version` -> loaded | loading | cold | refused | absent."""
    refused: dict[str, str] = field(default_factory=dict)
    """`name@version` -> why."""
    totals: dict[str, Numbers] = field(default_factory=dict)
    """`name@version`, or the base's name -> what it answered since `since`."""
    rollouts: dict[str, RolloutNumbers] = field(default_factory=dict)
    """By the rollout's id."""

    def is_live(self, now: float) -> bool:
        """Whether the replica seems to be there."""
        return is_alive(self.process) is not False and now - self.at < SILENT_S

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return {
            "replica": self.replica,
            "process": asdict(self.process),
            "at": self.at,
            "since": self.since,
            "states": self.states,
            "refused": self.refused,
            "totals": {name: numbers.to_dict() for name, numbers in self.totals.items()},
            "rollouts": {id: numbers.to_dict() for id, numbers in self.rollouts.items()},
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Report:
        """Reads what `to_dict` wrote."""
        return cls(
            stored["replica"],
            ProcessId(**stored["process"]),
            stored["at"],
            stored.get("since", stored["at"]),
            dict(stored.get("states", {})),
            dict(stored.get("refused", {})),
            {name: Numbers.from_dict(each) for name, each in stored.get("totals", {}).items()},
            {id: RolloutNumbers.from_dict(each) for id, each in stored.get("rollouts", {}).items()},
        )


class Reports:
    """The reports and the audit log of one endpoint."""

    def __init__(self, registry_url: str, endpoint: str) -> None:
        self._shared = SharedFolder(registry_url, endpoint)
        self.folder = self._shared.url
        self.lease_url = join(self.folder, "decider.json")
        self._audit_url = join(self.folder, "audit")

    def write(self, report: Report) -> None:
        """Replaces a replica's own report; raises as `SharedFolder.write`."""
        self._shared.write(stored.dump(report.to_dict()), "replicas", f"{report.replica}.json")

    def read(self) -> list[Report]:
        """Those of all replicas, also of some that are gone; damaged ones are passed over."""
        found = []
        for name in objects.list_(join(self.folder, "replicas")):
            url = join(self.folder, "replicas", name)
            try:
                found.append(Report.from_dict(stored.load(objects.read(url)[0], url)))
            except (NotFound, StorageError, KeyError, TypeError):
                continue
        return found

    def forget(self, rollouts: Iterable[str], now: float) -> None:
        """Deletes reports of replicas that are long gone, or gone and of no rollout that is under way."""
        needed = set(rollouts)
        for report in self.read():
            is_needed = needed & report.rollouts.keys() and now - report.at < _FORGOTTEN_S
            if not report.is_live(now) and not is_needed:
                objects.delete(join(self.folder, "replicas", f"{report.replica}.json"))

    def note(self, event: str, **facts: Any) -> None:
        """Adds a line to the audit log."""
        journal = Journal(self._audit_url)
        try:
            journal.append(
                stored.dump_line({"at": round(time.time(), 3), "event": event, **facts}), flush=True
            )
        finally:
            journal.close()

    def audit(self) -> list[dict[str, Any]]:
        """Every step, oldest first. Who is to end a step writes it down before he does: where two do, or one began
        again, it stands there twice and is told once."""
        steps, told = [], set()
        for line in read_lines(self._audit_url):
            try:
                step = json.loads(line)
            except ValueError:
                continue
            which = (step.get("rollout"), step.get("event"))
            if which[0] is None or which not in told:
                steps.append(step)
            told.add(which)
        return steps


def observe(rollout: Rollout, reports: Iterable[Report], now: float) -> Observed:
    """What all replicas together say of a rollout. Numbers of replicas that are gone count; what they hold does
    not."""
    numbers, live, refused = RolloutNumbers(), False, None
    for report in reports:
        if rollout.id in report.rollouts:
            numbers = numbers.plus(report.rollouts[rollout.id])
        if report.is_live(now):
            live = live or report.states.get(rollout.ref) == "loaded"
            refused = refused or report.refused.get(rollout.ref)
    return Observed(live, refused, numbers.metrics())
