"""A run from its first group of workers to its last: placed, followed, started again, grown, ended in time.

Ray Train is given one group of a fixed size at a time and never starts another by itself. What happens between two
groups is decided here, by the pure rules of `retries.py` and `elastic.py`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.errors import PlacementError, RaypeftError, TrainingError
from orchestrator.plan import Plan
from orchestrator.runner import TrainRequest
from peft_dist.lazy import lazy

from ..retries import FailureKind, Retries, smaller_micro_batch
from .elastic import Growth, size_to_try
from .nodes import away_from
from .placement import NodeRoom, places_in_all, places_now, what_is_missing

if TYPE_CHECKING:
    from orchestrator.train.driver import failures
else:
    failures = lazy("orchestrator.train.driver.failures")  # all of Ray Train: not before workers are placed

STOP_GRACE_S = 20.0
"""From `stop` until workers that have not left by themselves are ended; the runner promises 30 s in all."""

SAVE_GRACE_S = 300.0
"""Likewise where `retry.max_duration` is over: a long step may end, and its checkpoint be saved."""

WATCH_S = 1.0
"""How often a group that trains is looked after."""

SILENT_LOOKS = 3
"""How many looks in a row a node must not answer to count as lost. Its workers may be alive and step on without it, or
their peers may wait in a collective for minutes."""


class Leave(StrEnum):
    """Why workers are asked to save a checkpoint and to leave."""

    STOP = "stop"
    TIME = "max_duration"
    GROW = "grow"
    NODE_GOING = "node going"


class Reservation(Protocol):
    """Room for workers, or the wish for it; `nodes.Reservation`."""

    def wait(self, timeout_s: float) -> bool: ...
    def release(self) -> None: ...


class Cluster(Protocol):
    """What the attempts ask of a cluster; `nodes.RayCluster`."""

    def rooms(self) -> list[NodeRoom]: ...
    def grows_to(self) -> Mapping[str, float]: ...
    def going(self) -> set[str]: ...
    def silent(self, node_ids: Iterable[str]) -> dict[str, str]: ...
    def reserve(self, plan: Plan, num_workers: int, without: Collection[str] = ()) -> Reservation: ...


class Group(Protocol):
    """One group of workers; `trainer.Trainer`."""

    def train(self) -> dict[str, Any]: ...
    def abort(self) -> None: ...


class Desk(Protocol):
    """The driver's side of the mailbox."""

    def begin(self) -> None: ...
    def ask_to_leave(self) -> None: ...
    def places(self) -> dict[int, str]: ...
    def tell(self, kind: str, **fields: Any) -> None: ...
    def failed(self, **fields: Any) -> None: ...


class Attempts:
    """The groups of one run, one after the other.

    Args:
        open_group: makes the group of a request, whose plan has the attempt's own number of workers.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        request: TrainRequest,
        cluster: Cluster,
        desk: Desk,
        open_group: Callable[[TrainRequest], Group],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request, self._plan = request, request.plan
        self._cluster, self._desk, self._open, self._clock = cluster, desk, open_group, clock
        self._retries = Retries(request.spec.retry, request.spent.retries)
        self._growth = Growth(self._plan.counts, request.spec.resources.growth_interval)
        self._silent: dict[str, str] = {}
        self._unanswered: Counter[str] = Counter()
        self._group: Group | None = None
        self._demand: Reservation | None = None
        self._began, self._asked_at = clock() - request.spent.seconds, 0.0
        self._size = self._attempt = 0
        self._is_stepping = False
        self._lock, self._over = threading.Lock(), threading.Event()
        self.leave: Leave | None = None
        """Why the workers have been asked to leave; what ended the run where it is STOP or TIME."""

    def run(self) -> dict[str, Any] | None:
        """Rank 0's return value; None where the run was to end before any group did.

        Raises:
            RaypeftError: what ended the run.
        """
        watch = threading.Thread(target=self._watch, name="attempts", daemon=True)
        watch.start()
        try:
            while True:
                size = self._wait_for_room()
                if size is None:
                    return None
                end = self._train(size)
                if end is not None or self._is_ending():
                    return end
        finally:
            self._over.set()
            self._drop_demand()

    def stop(self) -> None:
        """Asks the workers to save and leave; `run` then returns soon."""
        self._ask(Leave.STOP)

    def stepped(self) -> None:
        """Notes that the group of now has taken a step."""
        self._is_stepping = True

    def is_overdue(self) -> bool:
        """Whether workers that were asked to end have had long enough."""
        if not self._is_ending():
            return False
        grace = STOP_GRACE_S if self.leave == Leave.STOP else SAVE_GRACE_S
        return self._clock() - self._asked_at > grace

    def look(self) -> None:
        """What is done once a second while a group trains."""
        limit = self._request.spec.retry.max_duration
        if limit is not None and self.leave != Leave.STOP and self._clock() - self._began > limit:
            self._ask(Leave.TIME)
        group = self._group
        if group is None:
            return
        own = Counter(self._desk.places().values())
        if self.is_overdue() or self._has_lost_a_node(own):
            group.abort()
        elif self.leave is None and self._is_stepping:
            self._look_at_nodes(own)

    def _watch(self) -> None:
        while not self._over.wait(WATCH_S):
            try:
                self.look()
            except Exception as error:
                # a cluster that does not answer for a moment is looked at again; one that is gone ends the run
                self._desk.tell("log", rank=0, text=f"raypeft: looking at the cluster failed: {error}\n")

    def _has_lost_a_node(self, own: Counter[str]) -> bool:
        """Whether a node of this group's workers has not answered for `SILENT_LOOKS` looks."""
        silent = self._cluster.silent(own)
        self._unanswered = Counter({node_id: self._unanswered[node_id] + 1 for node_id in silent})
        return any(looks >= SILENT_LOOKS for looks in self._unanswered.values())

    def _look_at_nodes(self, own: Counter[str]) -> None:
        """Leaves nodes that are going, and grows where there is room.

        Args:
            own: this group's workers by the id of their node.
        """
        if self._cluster.going() & set(own):
            self._ask(Leave.NODE_GOING)
            return
        now = self._clock()
        if not self._growth.is_due(self._size, now):
            return
        size = self._growth.size(self._size, places_now(self._plan, self._cluster.rooms(), own), now)
        if size is None:
            self._ask_for_nodes()
            return
        self._say("saving", f"there is room for {size} workers: a checkpoint, then on from {self._size}")
        self._growth.grew(now)
        self._ask(Leave.GROW)

    def _ask_for_nodes(self) -> None:
        """Shows an autoscaler that one more size would be taken."""
        if self._demand is not None or not self._cluster.grows_to() or self._plan.placement == "STRICT_PACK":
            return
        larger = min(count for count in self._plan.counts if count > self._size)
        self._demand = self._cluster.reserve(self._plan, larger - self._size)

    def _drop_demand(self) -> None:
        demand, self._demand = self._demand, None
        if demand is not None:
            demand.release()

    def _ask(self, why: Leave) -> None:
        """Asks the workers to save and leave. The end of the run goes before any other reason; the first word
        counts."""
        with self._lock:
            if self._is_ending() or self.leave == why:
                return
            if self.leave is not None and why not in (Leave.STOP, Leave.TIME):
                return
            self.leave, self._asked_at = why, self._clock()
        self._desk.ask_to_leave()

    def _is_ending(self) -> bool:
        return self.leave in (Leave.STOP, Leave.TIME)

    def _wait_for_room(self) -> int | None:
        """The number of workers to start with, once there is room for them; None where the run is to end.

        Their bundles are reserved as one placement group, so that an autoscaler sees the demand, and are let go again
        for Ray Train's own group.
        """
        self._drop_demand()
        began, said, started = self._clock(), "", time.strftime("%H:%M:%S")
        patience = self._request.spec.retry.start_timeout
        held: Reservation | None = None
        asked: tuple[int, frozenset[str]] | None = None
        try:
            while True:
                waited = self._clock() - began
                self._silent = self._cluster.silent(self._silent)
                rooms = [room for room in self._cluster.rooms() if room.node_id not in self._silent]
                size = size_to_try(
                    self._plan.counts,
                    in_all=places_in_all(self._plan, rooms),
                    free=places_now(self._plan, rooms),
                    waited_s=waited,
                )
                if (size, frozenset(self._silent)) != asked:
                    if held is not None:
                        held.release()
                    held = self._cluster.reserve(self._plan, size, self._silent)
                    asked = (size, frozenset(self._silent))
                assert held is not None
                if held.wait(1.0):
                    return None if self._is_ending() else size
                if self._is_ending():
                    return None
                missing = what_is_missing(self._plan.at(size), rooms)
                if waited > patience:
                    raise PlacementError(
                        f"no room after {patience:g} s of waiting for {missing}.",
                        where="resources",
                        hint="Free the cluster, ask for less, or raise retry.start_timeout.",
                    )
                if missing != said:
                    self._say("waiting", f"waiting since {started} for {missing}")
                    said = missing
        finally:
            if held is not None:
                held.release()

    def _train(self, size: int) -> dict[str, Any] | None:
        """One group of workers: its end where that is the run's, None to start another.

        Raises:
            RaypeftError: it failed, and `retry` has no more attempts for that.
        """
        plan = away_from(self._plan.at(size, self._plan.micro_batch_size), self._silent)
        if self._attempt and size != self._size:
            self._say("starting", f"going on with {size} worker{'s' * (size > 1)} instead of {self._size}")
        self._size, self._is_stepping = size, False
        self._attempt += 1
        self._desk.begin()
        with self._lock:
            if self._is_ending():
                return None
            self.leave = None
        group = self._open(replace(self._request, plan=plan))
        self._group = group
        try:
            end = group.train()
        except Exception as error:
            if self._is_ending():
                raise
            self._recover(error)
            return None
        finally:
            self._group = None
        if not end["is_stopped"] or self._is_ending():
            return end
        if self.leave != Leave.GROW:
            self._were_sent_away(end["steps"])
        return None

    def _were_sent_away(self, steps: int) -> None:
        """The workers left by themselves: their processes or their node had been told to end."""
        who = "a node was told to go" if self.leave == Leave.NODE_GOING else "a worker was told to end"
        saved = f"the checkpoint of step {steps} is saved" if steps else "no step was taken"
        cause = f"{who}: {saved}"
        will_retry = self._retries.allow(FailureKind.PREEMPTION)
        self._desk.failed(
            attempt=self._attempt,
            rank=None,
            kind=FailureKind.PREEMPTION.value,
            cause=cause,
            will_retry=will_retry,
        )
        if not will_retry:
            error = TrainingError(f"{cause}.", hint="Run the same command again to go on.")
            raise self._spent(FailureKind.PREEMPTION, error)

    def _recover(self, error: BaseException) -> None:
        """Tells why a group failed; raises where that ends the run."""
        places = self._desk.places()
        gone = self._cluster.silent(set(places.values()))
        self._silent |= gone
        lost = {rank: gone[node_id] for rank, node_id in places.items() if node_id in gone}
        failure = failures.failure_of(error, lost)
        will_retry = self._retries.allow(failure.kind)
        self._desk.failed(
            attempt=self._attempt,
            rank=failure.rank,
            kind=failure.kind,
            cause=failure.cause,
            will_retry=will_retry,
        )
        if not will_retry:
            raise self._spent(failure.kind, failure.error) from error
        if failure.kind == FailureKind.OUT_OF_MEMORY:
            self._halve()

    def _halve(self) -> None:
        """Fewer rows a forward, as many a step: what does not fit whole may fit in parts."""
        micro = smaller_micro_batch(self._plan.micro_batch_size)
        if micro < self._plan.micro_batch_size:
            self._say(
                "starting", f"going on with {micro} rows a forward instead of {self._plan.micro_batch_size}"
            )
        self._plan = self._plan.at(self._plan.num_workers, micro)

    def _spent(self, kind: FailureKind, error: RaypeftError) -> RaypeftError:
        said = self._retries.spent(kind)
        if said is None:
            return error
        return type(error)(f"{error.problem} {said}", where=error.where, hint=error.hint)

    def _say(self, state: str, message: str) -> None:
        self._desk.tell("state", state=state, message=message)
