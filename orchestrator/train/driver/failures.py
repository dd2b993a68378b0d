"""Why a group of workers failed: its kind, and one line for the user."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from orchestrator.errors import (
    DataError,
    ModelError,
    NotFiniteError,
    RaypeftError,
    SpecError,
    StorageError,
    TrainingError,
)

from ..faults import is_broken_link, is_out_of_memory
from ..retries import FailureKind

_LOGS = "See raypeft logs."
_OF_USERS: tuple[tuple[type[RaypeftError], FailureKind], ...] = (
    (DataError, FailureKind.DATA),
    (SpecError, FailureKind.CONFIG),
    (ModelError, FailureKind.CONFIG),
    (StorageError, FailureKind.STORAGE),
    (NotFiniteError, FailureKind.NAN),
)


@dataclass(frozen=True)
class Failure:
    """The end of a group: its kind, the rank that began it where one did, one line, and the error for the user."""

    kind: FailureKind
    rank: int | None
    cause: str
    error: RaypeftError


def failure_of(error: BaseException, lost_nodes: Mapping[int, str] | None = None) -> Failure:
    """What ended `Trainer.train`.

    Args:
        error: what it raised.
        lost_nodes: the ranks whose nodes are gone, and how to call each node.
    """
    if isinstance(error, WorkerGroupError):
        return failure_of_ranks(error.worker_failures, lost_nodes or {})
    if lost_nodes:
        return _lost_node(lost_nodes)
    inner = error.controller_failure if isinstance(error, ControllerError) else error
    if isinstance(inner, WorkerGroupStartupTimeoutError | WorkerGroupStartupFailedError):
        return _of(FailureKind.WORKER_LOST, None, f"the workers did not start: {last_line(inner)}", _LOGS)
    if isinstance(inner, RayActorError):
        return _of(FailureKind.WORKER_LOST, None, f"what leads the workers was lost: {_death(inner)}", _LOGS)
    if isinstance(inner, RayError):
        return _of(FailureKind.WORKER_LOST, None, f"Ray lost the workers: {last_line(inner)}", _LOGS)
    return _of(FailureKind.ERROR, None, f"Ray Train failed: {last_line(inner)}", _LOGS)


def failure_of_ranks(
    failures: Mapping[int, BaseException], lost_nodes: Mapping[int, str] | None = None
) -> Failure:
    """Picks the cause among the ranks' errors.

    When one rank fails the others fail with it, by a broken connection; so a user's error goes before memory,
    memory before the loss of a node or a worker, and a broken connection comes last.
    """
    ranked = sorted(failures.items(), key=lambda item: (_weight(item[1]), item[0]))
    rank, error = ranked[0]
    weight, where = _weight(error), f"worker {rank}"
    if weight == 0:
        assert isinstance(error, RaypeftError)
        return Failure(kind_of(error), rank, one_line(error), error)
    if weight == 1:
        hint = "Lower training.micro_batch_size or data.sequence_len, or set gradient_checkpointing: true."
        return _of(FailureKind.OUT_OF_MEMORY, rank, f"{where} ran out of memory: {one_line(error)}", hint)
    preempted = next((each for each, failed in ranked if _is_preempted(failed)), None)
    if preempted is not None:
        cause = f"worker {preempted} was taken away with its node, as the cluster had announced."
        return _of(FailureKind.PREEMPTION, preempted, cause, _LOGS)
    if lost_nodes and weight in (2, 4):
        return _lost_node(lost_nodes)
    if weight == 2:
        return _of(FailureKind.WORKER_LOST, rank, f"{where} was lost: {_death(error)}", _LOGS)
    if weight == 4:
        return _of(FailureKind.WORKER_LOST, rank, f"{where} lost the others: {one_line(error)}", _LOGS)
    cause = f"{where} failed with {type(error).__name__}: {one_line(error)}"
    return _of(FailureKind.ERROR, rank, cause, _LOGS)


def kind_of(error: RaypeftError) -> FailureKind:
    """The kind of an error that a worker raised for the user."""
    return next((kind for cls, kind in _OF_USERS if isinstance(error, cls)), FailureKind.ERROR)


def last_line(error: BaseException) -> str:
    """The last line of an error that carries another process's traceback: there the cause is named."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """The error's text as one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _of(kind: FailureKind, rank: int | None, cause: str, hint: str) -> Failure:
    return Failure(kind, rank, cause, TrainingError(cause, hint=hint))


def _lost_node(lost_nodes: Mapping[int, str]) -> Failure:
    rank = min(lost_nodes)
    ranks = sorted(each for each, node in lost_nodes.items() if node == lost_nodes[rank])
    who = f"worker{'s' * (len(ranks) > 1)} {_listed(ranks)} {'were' if len(ranks) > 1 else 'was'}"
    more = len(set(lost_nodes.values())) - 1
    others = f", and {more} more node{'s' * (more > 1)}" if more else ""
    cause = f"node {lost_nodes[rank]}, on which {who}, does not answer{others}."
    return _of(FailureKind.NODE_LOST, rank, cause, _LOGS)


def _listed(ranks: Collection[int]) -> str:
    return ", ".join(map(str, ranks))


def _weight(error: BaseException) -> int:
    """0 a user's error, 1 memory, 2 a lost worker, 3 any other, 4 a broken connection: a consequence as a
    rule."""
    if isinstance(error, RaypeftError):
        return 0
    if isinstance(error, OutOfMemoryError) or is_out_of_memory(error):
        return 1
    if isinstance(error, RayActorError | WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError):
        return 2
    if is_broken_link(error):
        return 4
    return 3


def _is_preempted(error: BaseException) -> bool:
    """Whether Ray says that the worker's node was drained."""
    inner = getattr(error, "health_check_failure", error)
    return isinstance(inner, RayActorError) and inner.preempted


def _death(error: BaseException) -> str:
    inner = getattr(error, "health_check_failure", error)
    if "SYSTEM_ERROR" in str(inner):  # all that Ray knows is a closed socket; its text guesses at length
        return "its process ended without a word: killed, out of the node's memory, or crashed."
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "its process is there, and answers no more: it is stopped, or its node is out of breath."
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    told = next((line for line in lines if "exit" in line.lower() or "killed" in line.lower()), None)
    text = told or (lines[0] if lines else type(inner).__name__)
    return text if len(text) <= 300 else text[:297] + "..."
