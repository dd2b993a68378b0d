"""Warm groups of workers over a cluster: which trial stands on which base, and what happens when a group dies."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from orchestrator.errors import LeaseError, RaypeftError
from orchestrator.plan.layout import Layout
from orchestrator.runner import Event, TrainRequest
from orchestrator.train.retries import FailureKind, Retries, smaller_micro_batch

PUMP_S = 0.5
"""Seconds that a group's events are waited for at a time."""


class WarmGroup(Protocol):
    """`train.warm.WarmGroup`: one base on a group of workers, trials that come and go."""

    def enter(self, trial_id: str, request: TrainRequest) -> None:
        """Puts a trial on the base, or in line for a place, under a new number of its fence; it goes on from its own
        newest checkpoint."""

    def leave(self, trial_id: str, *, save: bool = True) -> None:
        """Stops a trial at the next step; event `left`."""

    def events(self, timeout_s: float = 1.0) -> list[Event]:
        """What happened since, with `trial` where it is of one."""

    @property
    def is_alive(self) -> bool:
        """Whether it still takes trials."""

    def close(self, timeout_s: float = 30.0) -> None:
        """Ends it; its resources are free afterwards."""


OpenGroup = Callable[[TrainRequest, Layout], WarmGroup]
"""(what the base, the data and the workers are, trials on it) -> a group that starts in the background."""


@dataclass(eq=False)
class _Standing:
    """A group and who is on it."""

    number: int
    key: str
    group: WarmGroup
    workers: int
    opened: float
    places: int
    """Trials that stand on it at once."""
    trials: set[str] = field(default_factory=set)
    inside: set[str] = field(default_factory=set)
    """Those of them that were told to stand on the base, and do not wait in line for it."""
    is_ready: bool = False
    is_closed: bool = False


class Groups:
    """The groups of a sweep.

    Args:
        open_group: starts one.
        key_of: what trials on one base have in common; None: each needs a base of its own.
        layout: how many there are at most, and how many trials on each.
        has_room: whether the cluster has room now for one more, given how many are still starting.
    """

    def __init__(
        self,
        open_group: OpenGroup,
        key_of: Callable[[TrainRequest], str | None],
        layout: Layout,
        has_room: Callable[[int], bool],
    ) -> None:
        self._open_group, self._key_of, self._layout, self._has_room = open_group, key_of, layout, has_room
        self._standing: list[_Standing] = []
        self._waiting: dict[str, TrainRequest] = {}
        self._requests: dict[str, TrainRequest] = {}
        self._events: queue.SimpleQueue[tuple[_Standing, Event]] = queue.SimpleQueue()
        self._left: list[Event] = []
        self._retries: dict[str, Retries] = {}
        self._opened = 0
        self._worker_seconds = 0.0

    @property
    def worker_seconds(self) -> float:
        """Workers times seconds, of all groups until now."""
        now = time.monotonic()
        return self._worker_seconds + sum(each.workers * (now - each.opened) for each in self._standing)

    @property
    def trials(self) -> tuple[str, ...]:
        """Trials that stand on a base or wait for one."""
        return (*self._waiting, *(trial for each in self._standing for trial in each.trials))

    def open(self, request: TrainRequest) -> None:
        """Starts a group for trials like this one before there are any, where none is there."""
        key = self._key_of(request)
        if key is not None and not any(each.key == key for each in self._standing):
            self._start(key, request)

    def enter(self, trial: str, request: TrainRequest) -> None:
        """Has a trial train, now or as soon as there is a place."""
        self._requests[trial] = request
        if not self._place(trial, request):
            self._waiting[trial] = request

    def leave(self, trial: str, *, save: bool = True) -> None:
        """Stops a trial; its place is free at once. One that waited for a place, or for a base that is still loaded,
        has left already: event `left`."""
        if self._waiting.pop(trial, None) is not None:
            self._left.append({"event": "left", "trial": trial})
        for each in self._standing:
            if trial in each.trials:
                each.trials.discard(trial)
                each.group.leave(trial, save=save)
                if not each.is_ready:  # nobody there could answer, and it has taken no step
                    self._left.append({"event": "left", "trial": trial})
        self._requests.pop(trial, None)

    def take(self) -> list[Event]:
        """What happened since the last call. A group that died is gone, and its trials wait for a place again, from
        their checkpoints: event `group_failed` names them. Where memory ran out, groups hold fewer trials from then on,
        `at_once` of that event; a trial that was alone takes fewer rows a forward, as often as its `retry.oom` allows
        (`rows` of that event), then fails."""
        found, self._left = self._left, []
        while True:
            try:
                standing, event = self._events.get_nowait()
            except queue.Empty:
                break
            kind = event["event"]
            if kind == "ready":
                standing.is_ready = True
            elif kind == "entered":
                standing.inside.add(event["trial"])
            elif kind in ("finished", "failed", "left") and "trial" in event:
                standing.trials.discard(event["trial"])
                standing.inside.discard(event["trial"])
                if kind != "left":
                    self._requests.pop(event["trial"], None)
            elif kind == "group_failed":
                if event["kind"] == FailureKind.OUT_OF_MEMORY:
                    event = self._with_less_memory(standing, event)
                gone = [trial for trial in event.get("trials", ()) if trial not in standing.trials]
                found += [{"event": "left", "trial": trial} for trial in gone]  # as it was asked to
                self._lose(standing)
            found.append(event)
            if alone := event.get("fails"):
                self._waiting.pop(alone, None)
                self._requests.pop(alone, None)
                cause = f"memory ran out with this trial alone on the base: {event['cause']}"
                found.append({"event": "failed", "trial": alone, "kind": "out_of_memory", "cause": cause})
        self._fill()
        return found

    def close(self, timeout_s: float = 30.0) -> None:
        """Ends all groups, at the same time; trials on them save a checkpoint first."""
        self._waiting.clear()
        ends = [threading.Thread(target=self._end, args=(each, timeout_s)) for each in list(self._standing)]
        for thread in ends:
            thread.start()
        for thread in ends:
            thread.join(timeout_s + 5)

    def _place(self, trial: str, request: TrainRequest) -> bool:
        key = self._key_of(request) or f"alone {trial}"
        alike = [each for each in self._standing if each.key == key and each.group.is_alive]
        least = min(alike, key=lambda each: len(each.trials), default=None)
        if least is None or (len(least.trials) >= least.places and len(self._standing) < self._layout.groups):
            fresh = self._start(key, request) if self._may_start(bool(alike)) else None
            least = fresh or least
        if least is None:
            return False
        least.trials.add(trial)
        try:
            least.group.enter(trial, request)
        except (LeaseError, ValueError):
            raise
        except Exception:  # it died meanwhile, which its events will tell
            least.trials.discard(trial)
            return False
        return True

    def _may_start(self, has_alike: bool) -> bool:
        """Whether another group may start now; one of which nothing is asked any more makes room where it must."""
        starting = sum(not each.is_ready for each in self._standing)
        if len(self._standing) >= self._layout.groups or not self._has_room(starting):
            if has_alike:
                return False
            idle = next((each for each in self._standing if not each.trials), None)
            if idle is None:
                return not self._standing
            self._end(idle, 10.0)
        return True

    def _start(self, key: str, request: TrainRequest) -> _Standing:
        self._opened += 1
        layout = replace(self._layout, pack=1) if request.plan.alone else self._layout
        # a trial's fence is the trial's: a group that begins would raise it
        group = self._open_group(replace(request, fence=None), layout)
        workers = request.plan.num_workers
        standing = _Standing(self._opened, key, group, workers, time.monotonic(), layout.pack)
        self._standing.append(standing)
        threading.Thread(
            target=self._pump, args=(standing,), name=f"sweep-group-{self._opened}", daemon=True
        ).start()
        return standing

    def _pump(self, standing: _Standing) -> None:
        """The thread of one group: its events, in order, to the driver's."""
        while not standing.is_closed:
            is_over = not standing.group.is_alive
            found = standing.group.events(0.0 if is_over else PUMP_S)
            for event in found:
                self._events.put((standing, event))
            if is_over and not found:
                return

    def _lose(self, standing: _Standing) -> None:
        lost = [trial for trial in sorted(standing.trials) if trial in self._requests]
        self._forget(standing)
        standing.group.close(0.0)
        for trial in lost:
            self._waiting[trial] = self._requests[trial]

    def _with_less_memory(self, standing: _Standing, event: Event) -> Event:
        """What is done about a group whose memory ran out, in its event."""
        inside = [trial for trial in sorted(standing.inside) if trial in self._requests]
        if len(inside) > 1:
            pack = len(inside) // 2
            joined = self._layout.joined
            self._layout = replace(self._layout, pack=pack, joined=joined and min(joined, pack))
            return {**event, "at_once": pack}
        if not inside:  # the base itself, or the rows
            return event
        (trial,) = inside
        request = self._requests[trial]
        rows = smaller_micro_batch(request.plan.micro_batch_size)
        retries = self._retries.setdefault(trial, Retries(request.spec.retry))
        if rows < request.plan.micro_batch_size and retries.allow(FailureKind.OUT_OF_MEMORY):
            plan = request.plan.at(request.plan.num_workers, rows)
            self._requests[trial] = replace(request, plan=plan)
            return {**event, "trial_alone": trial, "rows": rows}
        return {**event, "fails": trial}

    def _fill(self) -> None:
        for trial, request in list(self._waiting.items()):
            if self._place(trial, request):
                self._waiting.pop(trial, None)

    def _forget(self, standing: _Standing) -> None:
        if standing in self._standing:
            self._standing.remove(standing)
            self._worker_seconds += standing.workers * (time.monotonic() - standing.opened)
        standing.is_closed = True

    def _end(self, standing: _Standing, timeout_s: float) -> None:
        try:
            standing.group.close(timeout_s)
        except RaypeftError:
            pass  # it is gone either way
        finally:
            self._forget(standing)
