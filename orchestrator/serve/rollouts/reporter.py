"""What a replica says of itself after each look at the registry, and its part in deciding rollouts."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from orchestrator.errors import RaypeftError
from orchestrator.processes import this_process

from .arbiter import Arbiter
from .observed import Observed
from .reports import Report, Reports, RolloutNumbers

_log = logging.getLogger("ray.serve")

_AT_LEAST_EVERY_S = 5.0
_MOST_ADAPTERS = 200
"""The busiest ones' numbers are reported, so that a report stays small."""


class Known(Protocol):
    """What a reporter asks of the catalogue."""

    base_name: str

    def states(self) -> dict[str, str]:
        """`name@version` -> what it is here."""

    def refused(self) -> dict[str, str]:
        """`name@version` -> why it cannot be served."""

    def rollouts(self) -> dict[str, tuple[str, str | None]]:
        """Ids -> keys of candidate and stable version."""

    def names(self) -> dict[str, str]:
        """Keys -> `name@version`."""


class Reporter:
    """A catalogue's companion: writes this replica's report, and lets its arbiter look.

    Args:
        replica: this replica's name, unlike any other's.
    """

    def __init__(self, replica: str, engine: Observed, reports: Reports, arbiter: Arbiter) -> None:
        self._replica, self._engine, self._reports, self._arbiter = replica, engine, reports, arbiter
        self.known: Known | None = None
        """The catalogue, once there is one."""
        self._since = time.time()
        self._written: tuple[Report, float] | None = None
        self._deciding: asyncio.Future[bool] | None = None
        self._is_new = True

    async def looked(self) -> None:
        """Writes a report where something is new, or some seconds are over."""
        assert self.known is not None
        rollouts = self.known.rollouts()
        self._engine.watch(rollouts)
        try:
            await asyncio.to_thread(self._write, self._report(self.known), list(rollouts))
        except (RaypeftError, OSError) as error:
            _log.warning("the report of this replica is not written: %s", error)
        if self._deciding is None or self._deciding.done():
            self._deciding = asyncio.ensure_future(asyncio.to_thread(self._decide))

    async def ended(self) -> None:
        """Leaves the lease to another replica."""
        if self._deciding is not None:
            await asyncio.wait([self._deciding], timeout=5)
        try:
            await asyncio.to_thread(self._arbiter.leave)
        except (RaypeftError, OSError) as error:
            _log.warning("the lease of rollouts is not given back: %s", error)

    def _decide(self) -> bool:
        try:
            return self._arbiter.step()
        except (RaypeftError, OSError) as error:
            _log.warning("rollouts are not decided now: %s", error)
            return False

    def _report(self, known: Known) -> Report:
        """Copies of all numbers: they go on counting while the report is written."""
        totals, names = {}, {"": known.base_name, **known.names()}
        for key in self._engine.totals.keys() - names.keys() - self._engine.loaded():
            del self._engine.totals[key]  # else it would grow with each version that ever was here
        busiest = sorted(self._engine.totals.items(), key=lambda item: -item[1].requests)
        for key, numbers in busiest[:_MOST_ADAPTERS]:
            if key in names:
                totals[names[key]] = numbers.plus(type(numbers)())
        rollouts = {
            id: RolloutNumbers(watch.candidate, watch.stable, watch.shadow).plus(RolloutNumbers())
            for id, watch in self._engine.watches.items()
        }
        return Report(
            self._replica,
            this_process(),
            time.time(),
            self._since,
            known.states(),
            known.refused(),
            totals,
            rollouts,
        )

    def _write(self, report: Report, rollouts: list[str]) -> None:
        if self._is_new:
            self._reports.forget(rollouts, report.at)
            self._is_new = False
        said = {**report.to_dict(), "at": 0}
        if self._written is not None:
            before, at = self._written
            if said == {**before.to_dict(), "at": 0} and time.monotonic() - at < _AT_LEAST_EVERY_S:
                return
        self._reports.write(report)
        self._written = (report, time.monotonic())
