"""What a sweep may use up and has, all its drivers together: time, and its workers' hours."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict

from orchestrator import objects, stored
from orchestrator.errors import RaypeftError
from orchestrator.objects import NotFound, join
from orchestrator.plan.layout import Layout
from orchestrator.runner import TrainRequest

from .groups import Groups

MAX_DURATION = "retry.max_duration"
"""The limit that interrupts a sweep; a budget ends it for good."""
_FILE = "sweep.json"
_LOOKS_S = 0.2
"""Between two looks at what is used up."""
_KEEPS_S = 15.0
"""Between two times that it is written down."""


class Account:
    """Of one driver, which begins where those before it ended.

    Args:
        request: of a job with a sweep.
        groups: whose workers are paid for.
        layout: where trials train.
    """

    def __init__(self, request: TrainRequest, groups: Groups, layout: Layout) -> None:
        assert request.spec.sweep is not None
        self._budget, self._limit = request.spec.sweep.budget, request.spec.retry.max_duration
        self._url = join(request.run_dir, _FILE)
        self._groups, self._layout = groups, layout
        self._seconds_before = request.spent.seconds
        self._worker_seconds_before = self._read()
        self._began = self._kept = time.monotonic()
        self._looked = 0.0

    def used_up(self) -> str | None:
        """The key of the job that is used up, `MAX_DURATION` or one of the sweep's budget; None as long as none is."""
        now = time.monotonic()
        if now - self._looked < _LOOKS_S:
            return None
        self._looked = now
        if now - self._kept >= _KEEPS_S:
            self.keep()
        seconds = self._seconds_before + now - self._began
        if self._budget.time is not None and seconds >= self._budget.time:
            return "sweep.budget.time"
        hours = self._worker_seconds / 3600
        if self._budget.worker_hours is not None and hours >= self._budget.worker_hours:
            return "sweep.budget.worker_hours"
        return MAX_DURATION if self._limit is not None and seconds >= self._limit else None

    def keep(self) -> None:
        """Writes down what was used, for the next driver, and where trials trained; every quarter of a minute by
        itself, since a driver may be killed."""
        self._kept = time.monotonic()
        document = {"worker_seconds": round(self._worker_seconds, 1), "layout": asdict(self._layout)}
        with contextlib.suppress(RaypeftError):
            objects.write(self._url, stored.dump(document))

    @property
    def _worker_seconds(self) -> float:
        return self._worker_seconds_before + self._groups.worker_seconds

    def _read(self) -> float:
        try:
            return float(stored.load(objects.read(self._url)[0], self._url).get("worker_seconds", 0.0))
        except NotFound:
            return 0.0
