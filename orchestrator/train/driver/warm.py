"""A warm group of workers as the driver sees it: a base that is loaded once, on which runs come and go."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import objects
from orchestrator.errors import PlacementError, RaypeftError
from orchestrator.runner import Event, TrainRequest
from peft_dist.lazy import lazy

from ..events import Mailbox
from ..packing import Packing
from ..worker.entry import run_warm_worker
from .nodes import RayCluster
from .placement import what_is_missing, why_impossible

if TYPE_CHECKING:
    from orchestrator.train.driver import failures, trainer
else:
    # they import all of Ray Train
    failures = lazy("orchestrator.train.driver.failures")
    trainer = lazy("orchestrator.train.driver.trainer")

_ENDS = ("finished", "failed", "left")


class GroupDied(Exception):
    """The group of workers is gone; says why."""


class WarmGroup:
    """Workers that load a base, its tokenizer and the data once; runs enter, step together and leave.

    Starts at once, in the background; a Ray session is up. No method waits for training, and any thread may call any.

    Events are plain dicts, as a runner's; of a run they have `trial`, its name:

        state, progress, eval, checkpoint, warning      as of a run alone
        entered     step (where it starts), seconds (until it stood on the base)
        left        step, checkpoint (URL or null): it was asked to
        finished    end: what a worker returns of a run (`run.RunEnd`) as a dict
        failed      kind (not_finite, out_of_memory, error), error (its class), cause, step, last_checkpoint (a step)

    and of the group, without it:

        ready       seconds, device, precision, message
        pack        mode (together, turns), trials, reason
        log         rank, text
        group_failed    kind, cause, rank, trials: those that were inside or in line; in a new group they go on from
                    their checkpoints

    Args:
        request: as of a run: its base, data, workers and secrets are the group's. It starts no run.
        packing: how runs stand on the base.

    Raises:
        PlacementError: the cluster can never give the workers.
    """

    def __init__(self, request: TrainRequest, packing: Packing = Packing()) -> None:
        self._request = request
        self._work = functools.partial(run_warm_worker, packing=packing)
        self._cluster = RayCluster()
        cluster = self._cluster
        if problem := why_impossible(request.plan, cluster.rooms(), cluster.grows_to(), cluster.kinds()):
            raise PlacementError(
                problem, where="resources", hint="Lower resources.num_workers or what each worker asks for."
            )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox: Any = ray.remote(num_cpus=0)(Mailbox)
        self._mailbox: Any = mailbox.options(scheduling_strategy=here).remote()
        if request.secrets:
            ray.get(self._mailbox.put_secrets.remote(dict(request.secrets)))
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._trials: dict[str, None] = {}
        self._failure: dict[str, Any] | None = None
        self._trainer: Any = None
        self._has_told = False
        self._thread = threading.Thread(target=self._drive, name="warm-group", daemon=True)
        self._thread.start()

    def __enter__(self) -> WarmGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def trials(self) -> tuple[str, ...]:
        """Runs inside or in line, as far as `events` has told."""
        with self._lock:
            return tuple(self._trials)

    @property
    def is_alive(self) -> bool:
        """Whether runs can enter."""
        return self._thread.is_alive() and not self._closing.is_set()

    @property
    def failure(self) -> str | None:
        """Why the whole group is gone; None while it lives, and after `close`."""
        return self._failure["cause"] if self._failure else None

    def enter(self, trial: str, request: TrainRequest, from_checkpoint: str | None = None) -> None:
        """Puts a run on the base before the next round, or in line.

        Args:
            request: as of the run alone; it goes on from the newest checkpoint in its folder.
            from_checkpoint: URL of another run's checkpoint, to go on from where it has none of its own.

        Raises:
            ValueError: the group has a run of this name. GroupDied: the group is gone.
        """
        with self._lock:
            if not self.is_alive:
                raise GroupDied(self.failure or "the group was closed")
            if trial in self._trials:
                raise ValueError(f"the group has a run {trial!r} already")
            self._trials[trial] = None
        fence = objects.persistently(request.fence.advanced) if request.fence else None
        told = replace(request, secrets={}, fence=fence)
        self._order("enter", trial=trial, request=told, from_checkpoint=from_checkpoint)

    def leave(self, trial: str, *, save: bool = True) -> None:
        """Stops a run before its next step and frees its place. Nothing where there is none of this name.

        Args:
            save: writes a checkpoint first; else its last one stays as it is.
        """
        if trial in self.trials and self.is_alive:
            self._order("leave", trial=trial, save=save)

    def events(self, timeout_s: float = 1.0) -> list[Event]:
        """All events since the last call, in their order; waits so long for the first, and not once the group has
        ended."""
        has_ended = not self._thread.is_alive()
        try:
            found: list[Event] = ray.get(self._mailbox.take.remote(0 if has_ended else timeout_s))
        except RayError:
            found = []
            has_ended = not self._thread.is_alive()
        with self._lock:
            for event in found:
                if event["event"] in _ENDS:
                    self._trials.pop(event.get("trial", ""), None)
            if has_ended and not found and self._failure is not None and not self._has_told:
                self._has_told = True
                found = [
                    {"event": "group_failed", "t": time.time(), **self._failure, "trials": list(self._trials)}
                ]
                self._trials.clear()
        return found

    def close(self, timeout_s: float = 30.0) -> None:
        """Stops the runs, each at a checkpoint, ends the workers and gives back what they held. Again: nothing."""
        if not self._closing.is_set():
            self._closing.set()
            with contextlib.suppress(RayError):
                self._order("close")
        self._thread.join(timeout_s)
        if self._thread.is_alive() and self._trainer is not None:
            self._trainer.abort()
            self._thread.join(10)

    def _order(self, what: str, **order: Any) -> None:
        ray.get(self._mailbox.order.remote({"do": what, **order}))

    def _drive(self) -> None:
        """The thread: from room for the workers to their end."""
        try:
            if not self._wait_for_room():
                return
            self._trainer = trainer.Trainer(self._request, self._mailbox, self._work)
            end = self._trainer.train()
            if not end["is_asked"] and not self._closing.is_set():
                self._failure = {"kind": "preemption", "cause": "a worker was told to end.", "rank": None}
        except RaypeftError as error:
            self._failure = {"kind": type(error).__name__, "cause": str(error), "rank": None}
        except Exception as error:
            if not self._closing.is_set():
                self._failure = self._why(error)

    def _why(self, error: Exception) -> dict[str, Any]:
        lost: dict[int, str] = {}
        with contextlib.suppress(RayError):
            places = ray.get(self._mailbox.places.remote())
            gone = self._cluster.silent(set(places.values()))
            lost = {rank: gone[node] for rank, node in places.items() if node in gone}
        failure = failures.failure_of(error, lost)
        return {"kind": str(failure.kind.value), "cause": failure.cause, "rank": failure.rank}

    def _wait_for_room(self) -> bool:
        """Whether there is room for the workers before the group is closed.

        Raises:
            PlacementError: there was none for `retry.start_timeout`.
        """
        plan, began = self._request.plan, time.monotonic()
        patience = self._request.spec.retry.start_timeout
        held = self._cluster.reserve(plan, plan.num_workers)
        try:
            while not held.wait(1.0):
                if self._closing.is_set():
                    return False
                if time.monotonic() - began > patience:
                    missing = what_is_missing(plan, self._cluster.rooms())
                    raise PlacementError(
                        f"no room after {patience:g} s of waiting for {missing}.", where="resources"
                    )
        finally:
            held.release()
        return not self._closing.is_set()
