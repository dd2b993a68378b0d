"""A job's plan on Ray: `runner.Runner`, its session, its events, its end."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import (
    ClusterError,
    Interrupted,
    OutOfTimeError,
    PlacementError,
    RaypeftError,
    TrainingError,
)
from orchestrator.runner import Event, TrainOutcome, TrainRequest
from orchestrator.spec.durations import format_duration
from peft_dist.lazy import lazy

from ..events import Mailbox
from .attempts import Attempts, Group, Leave
from .nodes import RayCluster
from .placement import why_impossible

if TYPE_CHECKING:
    from orchestrator.train.driver import failures, trainer
else:
    # they import all of Ray Train: not before a plan that can never be placed is refused
    failures = lazy("orchestrator.train.driver.failures")
    trainer = lazy("orchestrator.train.driver.trainer")


class RayRunner:
    """`runner.Runner` on Ray Train. A Ray session is up, or `gcs_address` names one to join."""

    _mailbox: Any
    """The actor of `events.Mailbox`."""
    _attempts: Attempts
    """The groups of workers; from `start` on."""

    def __init__(self, gcs_address: str | None = None) -> None:
        self._address = gcs_address
        self._thread: threading.Thread | None = None
        self._end: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._first_step_s = float("nan")

    def start(self, request: TrainRequest) -> None:
        """Checks that the workers can be placed at all, then trains in the background.

        Raises:
            ClusterError: Ray does not answer.
            PlacementError: the cluster can never give the workers.
        """
        self._began = time.monotonic()
        self._request = request
        if not ray.is_initialized():
            self._connect()
        cluster = RayCluster()
        if problem := why_impossible(request.plan, cluster.rooms(), cluster.grows_to(), cluster.kinds()):
            raise PlacementError(
                problem, where="resources", hint="Lower resources.num_workers or what each worker asks for."
            )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox: Any = ray.remote(num_cpus=0)(Mailbox)
        self._mailbox = mailbox.options(scheduling_strategy=here).remote()
        if request.secrets:
            ray.get(self._mailbox.put_secrets.remote(dict(request.secrets)))
        self._attempts = Attempts(request, cluster, MailboxDesk(self._mailbox), self._open_group)
        self._thread = threading.Thread(target=self._drive, name="ray-train", daemon=True)
        self._thread.start()

    def events(self) -> Iterator[Event]:
        """Yields events as they come; ends when the run has ended."""
        assert self._thread is not None, "start() first"
        while True:
            has_ended = not self._thread.is_alive()
            try:
                arrived = ray.get(self._mailbox.take.remote(0 if has_ended else 0.5))
            except RayError:
                self._lose_cluster()
                arrived, has_ended = [], True
            for event in arrived:
                if event["event"] == "progress":
                    self._attempts.stepped()
                    if self._first_step_s != self._first_step_s:
                        self._first_step_s = time.monotonic() - self._began
                yield event
            if has_ended and not arrived:
                self._close()
                return

    def stop(self) -> None:
        """Asks the workers to checkpoint at their next step and to leave; ends those that do not."""
        self._attempts.stop()

    def outcome(self) -> TrainOutcome:
        """The result.

        Raises:
            Interrupted: it was stopped; the checkpoint is there.
            OutOfTimeError: retry.max_duration is over; the checkpoint is there.
            RaypeftError: what ended the run.
        """
        if self._error is not None:
            raise self._user_error(self._error)
        if self._end is None or self._end["is_stopped"]:
            steps = self._end["steps"] if self._end else 0
            raise self._ended_early(steps)
        end = {key: value for key, value in self._end.items() if key != "is_stopped"}
        return TrainOutcome(first_step_s=self._first_step_s, **end)

    def _connect(self) -> None:
        try:
            ray.init(address=self._address or "auto", log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"no Ray answers: {error}", where=self._address, hint="Start one with `raypeft up`."
            ) from error

    def _ended_early(self, steps: int) -> RaypeftError:
        """Stopped, or out of time, after so many steps."""
        run, saved = self._request.run_id, f"The checkpoint of step {steps} is saved" if steps else ""
        limit = self._request.spec.retry.max_duration
        if self._attempts.leave == Leave.TIME and limit is not None:
            way_on = f"run it again with --resume to go on for {format_duration(limit)} more."
            return OutOfTimeError(
                f"run '{run}' ended after {steps} step(s): retry.max_duration ({format_duration(limit)}) is over.",
                hint=f"{saved}; {way_on}" if saved else f"{way_on[0].upper()}{way_on[1:]}",
            )
        return Interrupted(
            f"run '{run}' was stopped after {steps} step(s).",
            hint=f"{saved}; run the same command again to go on."
            if saved
            else "Run the same command again to go on.",
        )

    def _open_group(self, request: TrainRequest) -> Group:
        return trainer.Trainer(request, self._mailbox)

    def _drive(self) -> None:
        """The thread: all groups of workers, one after the other."""
        try:
            self._end = self._attempts.run()
        except BaseException as error:
            self._error = error

    def _lose_cluster(self) -> None:
        """The mailbox does not answer: the session is gone, and with it the workers, whatever was told of them."""
        if isinstance(self._error, RaypeftError) and type(self._error) is not TrainingError:
            return  # what ended the run before: bad data, a storage
        self._error = ClusterError(
            "the Ray cluster was lost while the run was on it.",
            where=f"run {self._request.run_id}",
            hint="Run the same command again: it goes on from the last checkpoint.",
        )

    def _close(self) -> None:
        if self._thread is not None:
            self._thread.join(timeout=5)
        with contextlib.suppress(RayError):
            ray.kill(self._mailbox)

    def _user_error(self, error: BaseException) -> RaypeftError:
        if isinstance(error, RaypeftError):
            return error
        ending = self._attempts.leave
        if ending in (Leave.STOP, Leave.TIME):
            why = "was stopped" if ending == Leave.STOP else "ran out of retry.max_duration"
            kind = Interrupted if ending == Leave.STOP else OutOfTimeError
            return kind(
                f"run '{self._request.run_id}' {why}; its workers did not leave by themselves.",
                hint="Run the same command again: it goes on from the last checkpoint.",
            )
        return failures.failure_of(error).error


class MailboxDesk:
    """The driver's side of the mailbox; `attempts.Desk`."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def begin(self) -> None:
        """Before a group of workers: none is placed, none is to leave."""
        ray.get(self._mailbox.begin.remote())

    def ask_to_leave(self) -> None:
        """Workers save a checkpoint at their next step and leave."""
        self._mailbox.request_stop.remote()

    def places(self) -> dict[int, str]:
        """Rank -> the id of its node."""
        return ray.get(self._mailbox.places.remote())

    def tell(self, kind: str, **fields: Any) -> None:
        """An event of the driver's own."""
        self._mailbox.push.remote([{"event": kind, "t": time.time(), **fields}])

    def failed(self, **fields: Any) -> None:
        """The end of a group of workers, as an event."""
        self._mailbox.failed.remote(**fields)
