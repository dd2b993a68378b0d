"""A job's plan on Ray Train: places the workers, follows them, starts them again, stops them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import ClusterError, Interrupted, PlacementError, RaypeftError
from orchestrator.runner import Event, TrainOutcome, TrainRequest
from peft_dist.lazy import lazy

from .events import Mailbox
from .placement import NodeRoom, what_is_missing, why_impossible

if TYPE_CHECKING:
    from orchestrator.train import failures, trainer
else:
    # they import torch and all of Ray Train: not before a plan that can never be placed is refused
    failures = lazy("orchestrator.train.failures")
    trainer = lazy("orchestrator.train.trainer")

STOP_GRACE_S = 20.0
"""From `stop` until workers that have not left by themselves are ended; the runner promises 30 s in all."""


class RayRunner:
    """`runner.Runner` on Ray Train. A Ray session is up, or `gcs_address` names one to join."""

    _mailbox: Any
    """The actor of `events.Mailbox`."""

    def __init__(self, gcs_address: str | None = None) -> None:
        self._address = gcs_address
        self._thread: threading.Thread | None = None
        self._trainer: trainer.Trainer | None = None
        self._end: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._first_step_s = float("nan")
        self._stopped_at: float | None = None

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
        nodes, most = cluster_rooms(), ray._private.state.state.get_max_resources_from_cluster_config()
        if problem := why_impossible(request.plan, nodes, most):
            raise PlacementError(
                problem, where="resources", hint="Lower resources.num_workers or what each worker asks for."
            )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox: Any = ray.remote(num_cpus=0)(Mailbox)
        self._mailbox = mailbox.options(scheduling_strategy=here).remote()
        if request.secrets:
            ray.get(self._mailbox.put_secrets.remote(dict(request.secrets)))
        self._is_single_node = len(nodes) == 1 and not most
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
                if event["event"] == "progress" and self._first_step_s != self._first_step_s:
                    self._first_step_s = time.monotonic() - self._began
                yield event
            if has_ended and not arrived:
                self._close()
                return
            if self._is_overdue() and self._trainer is not None:
                self._trainer.abort()

    def stop(self) -> None:
        """Asks the workers to checkpoint at their next step and to leave; ends them after `STOP_GRACE_S`."""
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
        self._mailbox.request_stop.remote()

    def outcome(self) -> TrainOutcome:
        """The result.

        Raises:
            Interrupted: it was stopped; the checkpoint is there.
            RaypeftError: what ended the run.
        """
        if self._error is not None:
            raise self._user_error(self._error)
        if self._end is None or self._end["is_stopped"]:
            steps = self._end["steps"] if self._end else 0
            saved = f"The checkpoint of step {steps} is saved; run" if steps else "Run"
            raise Interrupted(
                f"run '{self._request.run_id}' was stopped after {steps} step(s).",
                hint=f"{saved} the same command again to go on.",
            )
        end = {key: value for key, value in self._end.items() if key != "is_stopped"}
        return TrainOutcome(first_step_s=self._first_step_s, **end)

    def _connect(self) -> None:
        try:
            ray.init(address=self._address or "auto", log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"no Ray answers: {error}", where=self._address, hint="Start one with `raypeft up`."
            ) from error

    def _drive(self) -> None:
        """The thread: waits for room, trains, keeps what came of it."""
        try:
            if not self._wait_for_room():
                return
            self._trainer = trainer.Trainer(self._request, self._mailbox, is_single_node=self._is_single_node)
            if self._stopped_at is None:
                self._end = self._trainer.train()
        except BaseException as error:
            self._error = error

    def _wait_for_room(self) -> bool:
        """Returns once the cluster has room for all workers; False where a stop was asked for meanwhile.

        The workers' bundles are reserved as one placement group, so that an autoscaler sees the demand, and
        are let go again for Ray Train's own group.
        """
        plan = self._request.plan
        patience = self._request.spec.retry.start_timeout
        labels = [plan.labels] * plan.num_workers if plan.labels else None
        began, said = time.time(), ""
        group = placement_group(
            [dict(plan.bundle)] * plan.num_workers, strategy=plan.placement, bundle_label_selector=labels
        )
        try:
            while not group.wait(1):
                if self._stopped_at is not None:
                    return False
                missing = what_is_missing(plan, cluster_rooms())
                since = time.strftime("%H:%M:%S", time.localtime(began))
                if time.time() - began > patience:
                    raise PlacementError(
                        f"no room after {patience:g} s of waiting for {missing}.",
                        where="resources",
                        hint="Free the cluster, ask for less, or raise retry.start_timeout.",
                    )
                if missing != said:
                    self._tell("state", state="waiting", message=f"waiting since {since} for {missing}")
                    said = missing
        finally:
            remove_placement_group(group)
        return self._stopped_at is None

    def _is_overdue(self) -> bool:
        return self._stopped_at is not None and time.monotonic() - self._stopped_at > STOP_GRACE_S

    def _tell(self, kind: str, **fields: Any) -> None:
        self._mailbox.push.remote([{"event": kind, "t": time.time(), **fields}])

    def _lose_cluster(self) -> None:
        """The mailbox does not answer: the session is gone."""
        self._error = self._error or ClusterError(
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
        if self._stopped_at is not None:
            return Interrupted(
                f"run '{self._request.run_id}' was stopped; its workers did not leave by themselves.",
                hint="Run the same command again: it goes on from the last checkpoint.",
            )
        return failures.user_error(error, where=f"run {self._request.run_id}")


def cluster_rooms() -> list[NodeRoom]:
    """The cluster's live nodes, with what each has and what is free."""
    free = ray._private.state.available_resources_per_node()
    return [
        NodeRoom(node["Resources"], free.get(node["NodeID"], {}), node.get("Labels", {}))
        for node in ray.nodes()
        if node["Alive"]
    ]
