"""A sweep as `runner.Runner`: a thread in which its driver works, and what it tells."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from orchestrator.errors import LeaseError, RaypeftError, TrainingError
from orchestrator.plan.layout import Layout
from orchestrator.runner import Event, TrainOutcome, TrainRequest
from orchestrator.spec.trials import count_trials

from .driver import Driver
from .ending import write_report
from .groups import Groups, OpenGroup


class SweepRunner:
    """`runner.Runner` of a job with a sweep: Tune's trials train in warm groups, and the best one is what the run
    comes to.

    Args:
        open_group: starts a warm group of workers.
        key_of: what trials on one base have in common; None: each needs a base of its own.
        lay_out: where so many trials of a plan train, by the cluster as it is.
        has_room: whether the cluster has room for a plan's workers now, so many groups of them still starting.
    """

    def __init__(
        self,
        open_group: OpenGroup,
        key_of: Callable[[TrainRequest], str | None],
        lay_out: Callable[[TrainRequest, int], Layout],
        has_room: Callable[[TrainRequest, int], bool],
    ) -> None:
        self._open_group, self._key_of = open_group, key_of
        self._lay_out, self._has_room = lay_out, has_room
        self._told: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._error: RaypeftError | None = None
        self._outcome: TrainOutcome | None = None
        self._first_step_s = math.nan

    def start(self, request: TrainRequest) -> None:
        """Trains in the background.

        Raises:
            PlacementError: the cluster can never give a group of workers.
        """
        assert request.spec.sweep is not None
        self._began = time.monotonic()
        self._request = request
        self._layout = self._lay_out(request, count_trials(request.spec.sweep))
        self._thread = threading.Thread(target=self._drive, name="sweep", daemon=True)
        self._thread.start()

    def events(self) -> Iterator[Event]:
        """Yields events as they come; ends when the sweep has ended."""
        while (event := self._told.get()) is not None:
            yield event

    def stop(self) -> None:
        """Has all trials save a checkpoint and leave."""
        self._stop.set()

    def outcome(self) -> TrainOutcome:
        """The best trial's.

        Raises:
            Interrupted: it was stopped; finished trials are kept, the others go on from their checkpoints.
            OutOfTimeError: retry.max_duration is over.
            RaypeftError: what ended it.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return replace(self._outcome, first_step_s=self._first_step_s)

    def _drive(self) -> None:
        """The thread: everything. A sweep that did not come to its end leaves a report of what there is."""
        try:
            with contextlib.closing(
                Driver(self._request, self._layout, self._groups(), self._tell)
            ) as driver:
                self._outcome = driver.run(self._stop)
        except BaseException as error:
            self._error = error if isinstance(error, RaypeftError) else _unexpected(error)
            if not isinstance(error, LeaseError):  # else the folder is another driver's now
                write_report(self._request, self._tell)
        finally:
            self._told.put(None)

    def _groups(self) -> Groups:
        return Groups(
            self._open_group,
            self._key_of,
            self._layout,
            lambda starting: self._has_room(self._request, starting),
        )

    def _tell(self, kind: str, /, **fields: Any) -> None:
        if kind == "progress" and math.isnan(self._first_step_s):
            self._first_step_s = time.monotonic() - self._began
        self._told.put({"event": kind, "t": round(time.time(), 3), **fields})


def _unexpected(error: BaseException) -> RaypeftError:
    found = TrainingError(f"the sweep ended: {type(error).__name__}: {error}")
    found.__cause__ = error
    return found
