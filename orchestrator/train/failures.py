"""Why a group of workers failed, in one line, and whether starting it again can help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2.api.config import FailureConfig

from orchestrator.errors import RaypeftError, TrainingError

MAX_WORKER_LOSSES = 2
"""How often a run starts its workers again after it has lost one."""

_BROKEN_LINK = ("connection closed", "connection reset", "broken pipe", "gloo", "nccl", "timed out", "socket")
_OUT_OF_MEMORY = (
    "out of memory",
    "outofmemory",
    "can't allocate memory",
    "oom-kill",
    "memory usage threshold",
)


@dataclass(frozen=True)
class Failure:
    """The cause of a group's end: the rank that began it, one line, the error for the user, and whether a new
    attempt can help."""

    rank: int
    cause: str
    error: RaypeftError
    can_retry: bool


def failure_of(failures: Mapping[int, BaseException]) -> Failure:
    """Picks the cause among the ranks' errors.

    When one rank fails the others fail with it, by a broken connection; so a user's error goes before memory,
    memory before the loss of a worker, and a broken connection comes last.
    """
    ranked = sorted(failures.items(), key=lambda item: (_weight(item[1]), item[0]))
    rank, error = ranked[0]
    kind = _weight(error)
    if kind == 0:
        assert isinstance(error, RaypeftError)
        return Failure(rank, one_line(error), error, can_retry=False)
    where = f"worker {rank}"
    if kind == 1:
        cause = f"{where} ran out of memory: {one_line(error)}"
        hint = "Lower training.micro_batch_size or data.sequence_len, or set gradient_checkpointing: true."
        return Failure(rank, cause, TrainingError(cause, hint=hint), can_retry=False)
    if kind == 2:
        cause = f"{where} was lost: {_death(error)}"
        return Failure(rank, cause, TrainingError(cause, hint="See raypeft logs."), can_retry=True)
    if kind == 4:
        cause = f"{where} lost the others: {one_line(error)}"
        return Failure(rank, cause, TrainingError(cause, hint="See raypeft logs."), can_retry=True)
    cause = f"{where} failed with {type(error).__name__}: {one_line(error)}"
    return Failure(rank, cause, TrainingError(cause, hint="See raypeft logs."), can_retry=False)


def user_error(error: BaseException, where: str) -> RaypeftError:
    """What ended `TorchTrainer.fit`, for the user."""
    if isinstance(error, WorkerGroupError):
        return failure_of(error.worker_failures).error
    return TrainingError(f"Ray Train failed: {last_line(error)}", where=where, hint="See raypeft logs.")


def last_line(error: BaseException) -> str:
    """The last line of an error that carries another process's traceback: there the cause is named."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """The error's text as one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


class RunFailurePolicy(DefaultFailurePolicy):
    """Ray's policy, but what a new attempt cannot mend ends the run at once; each failure is told to the
    mailbox.

    It lives in Ray Train's controller.
    """

    def __init__(self, mailbox: Any, max_losses: int = MAX_WORKER_LOSSES) -> None:
        super().__init__(FailureConfig(max_failures=max_losses))
        self._mailbox, self._attempt = mailbox, 0

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Retry or raise; see Ray's FailurePolicy."""
        if not isinstance(training_failed_error, WorkerGroupError):
            return super().make_decision(training_failed_error)
        failure = failure_of(training_failed_error.worker_failures)
        decision = (
            super().make_decision(training_failed_error) if failure.can_retry else FailureDecision.RAISE
        )
        self._attempt += 1
        will_retry = decision == FailureDecision.RETRY
        self._mailbox.failed.remote(self._attempt, failure.rank, failure.cause, will_retry)
        return decision


def _weight(error: BaseException) -> int:
    """0 a user's error, 1 memory, 2 a lost worker, 3 any other, 4 a broken connection: a consequence as a
    rule."""
    text = f"{type(error).__name__} {error}".lower()
    if isinstance(error, RaypeftError):
        return 0
    if isinstance(error, MemoryError | OutOfMemoryError) or any(word in text for word in _OUT_OF_MEMORY):
        return 1
    if isinstance(error, RayActorError | WorkerHealthCheckFailedError):
        return 2
    if isinstance(error, RuntimeError | OSError) and any(word in text for word in _BROKEN_LINK):
        return 4
    return 3


def _death(error: BaseException) -> str:
    inner = getattr(error, "health_check_failure", error)
    if "SYSTEM_ERROR" in str(inner):  # all that Ray knows is a closed socket; its text guesses at length
        return "its process ended without a word: killed, out of the node's memory, or crashed."
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    told = next((line for line in lines if "exit" in line.lower() or "killed" in line.lower()), None)
    text = told or (lines[0] if lines else type(inner).__name__)
    return text if len(text) <= 300 else text[:297] + "..."
