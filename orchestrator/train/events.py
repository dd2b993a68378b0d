"""How workers tell the driver what happens: a mailbox between them, and a reporter that never holds up a
step.

The mailbox is a Ray actor without a CPU beside the driver (made so in `launch.py`; the class itself is plain
and imports neither Ray nor torch, so that its process starts fast). It also hands the secrets to the workers:
an actor's method is the one way by which they appear in no runtime environment, job record or dashboard page.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from orchestrator.runner import Event

from .output import without_secrets

PUSH_INTERVAL_S = 0.3
"""Least time between two pushes of one worker."""

AT_ONCE = ("eval", "finished", "failed", "left")
"""What the driver decides by, and a trial's place may wait for: pushed without that pause."""

HEARTBEAT_S = 1.0
"""A worker without news still asks this often whether it should stop."""


class Mailbox:
    """Events on their way from workers to the driver, the request to stop and the secrets."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._arrived = asyncio.Event()
        self._stop = False
        self._secrets: dict[str, str] = {}
        self._places: dict[int, str] = {}
        self._orders: list[dict[str, Any]] = []
        self._ordered = asyncio.Event()

    async def push(self, events: list[Event]) -> bool:
        """Takes events in; True where the workers should checkpoint and leave."""
        self._events.extend(events)
        if events:
            self._arrived.set()
        return self._stop

    async def failed(self, cause: str, **facts: Any) -> None:
        """Takes in the end of a group of workers: `attempt, rank, kind, will_retry`, and the cause."""
        cause = without_secrets(cause, self._secrets.values())
        await self.push([{"event": "failure", "t": time.time(), "cause": cause, **facts}])

    async def begin(self) -> None:
        """Forgets the last group of workers: where they were, and that they were to leave."""
        self._stop, self._places = False, {}

    async def placed(self, rank: int, node_id: str) -> None:
        """Notes on which node a worker of this group is."""
        self._places[rank] = node_id

    async def places(self) -> dict[int, str]:
        """Rank -> the id of its node, of the workers that have begun."""
        return dict(self._places)

    async def take(self, timeout_s: float) -> list[Event]:
        """All events since the last call; waits up to `timeout_s` for the first."""
        if not self._events:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout_s)
            except TimeoutError:
                return []
        events, self._events = self._events, []
        return events

    async def order(self, order: dict[str, Any]) -> None:
        """Keeps an order for workers that take any."""
        self._orders.append(order)
        self._ordered.set()

    async def orders(self, timeout_s: float) -> list[dict[str, Any]]:
        """All orders since the last call; waits up to `timeout_s` for the first."""
        if not self._orders:
            self._ordered.clear()
            try:
                await asyncio.wait_for(self._ordered.wait(), timeout_s)
            except TimeoutError:
                return []
        orders, self._orders = self._orders, []
        return orders

    async def request_stop(self) -> None:
        """From now on every push answers True."""
        self._stop = True

    async def put_secrets(self, secrets: dict[str, str]) -> None:
        """Keeps the secrets in this process's memory for the workers."""
        self._secrets = dict(secrets)

    async def secrets(self) -> dict[str, str]:
        """The secrets of this run, by name."""
        return self._secrets


class Told(Protocol):
    """Where a run's events go, and from where it hears that it is to leave; `Reporter` is one."""

    @property
    def stop_requested(self) -> bool:
        """Whether it is to leave at its next step."""

    def emit(self, kind: str, /, **fields: Any) -> None:
        """Tells an event."""


class Reporter:
    """A worker's end of the mailbox: `emit` puts an event into a buffer and returns; a thread sends the
    buffer.

    Args:
        push: takes a list of events, blocks until they have arrived, and says whether to stop.
        interval_s: least time between two pushes.
    """

    def __init__(self, push: Callable[[list[Event]], bool], interval_s: float = PUSH_INTERVAL_S) -> None:
        self._push, self._interval_s = push, interval_s
        self._buffer: list[Event] = []
        self._lock = threading.Lock()
        self._wake, self._hurry, self._closed = threading.Event(), threading.Event(), False
        self.stop_requested = False
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def emit(self, kind: str, /, **fields: Any) -> None:
        """Reports `{"event": kind, "t": now, **fields}` soon."""
        with self._lock:
            self._buffer.append({"event": kind, "t": time.time(), **fields})
        if kind in AT_ONCE:
            self._hurry.set()
        self._wake.set()

    def request_stop(self) -> None:
        """Has this worker ask the others for a checkpoint at their next step, and to leave."""
        self.stop_requested = True

    def close(self) -> None:
        """Sends what is left and ends the thread; waits for at most five seconds."""
        self._closed = True
        self._hurry.set()
        self._wake.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            self._wake.wait(HEARTBEAT_S)
            self._wake.clear()
            self._hurry.clear()
            closing = self._closed
            self._send()
            if closing:
                return
            if not self._closed:
                self._hurry.wait(self._interval_s)

    def _send(self) -> None:
        with self._lock:
            events, self._buffer = self._buffer, []
        try:
            self.stop_requested = bool(self._push(events)) or self.stop_requested
        except Exception as error:
            # the driver is gone, and with it whoever would read this; Ray ends this worker soon
            print(f"raypeft: {len(events)} event(s) did not reach the driver: {error}")
