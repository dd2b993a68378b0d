"""Failures told apart: the golden texts of ranks, of Ray's controller, of nodes that are gone."""

import pytest
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from orchestrator.errors import (
    DataError,
    LeaseError,
    ModelError,
    NotFiniteError,
    SpecError,
    StorageError,
    TrainingError,
)
from orchestrator.train.driver.failures import failure_of, failure_of_ranks, one_line
from orchestrator.train.retries import FailureKind

LOST = WorkerHealthCheckFailedError(
    "A worker health check failed.", RayActorError(error_msg="The actor died.\nworker exit: SIGKILL")
)
LINK = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


KILLED = RayActorError(
    error_msg="The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit "
    "detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: "
    "(1) the process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called"
)


PREEMPTED = RayActorError(error_msg="The actor died because its node was preempted.", preempted=True)


@pytest.mark.parametrize(
    ("failures", "rank", "words", "kind"),
    [
        ({0: LINK, 1: LOST}, 1, "worker 1 was lost: worker exit: SIGKILL", "worker lost"),
        (
            {0: LINK, 1: KILLED},
            1,
            "worker 1 was lost: its process ended without a word: killed, out of the node's memory, or crashed.",
            "worker lost",
        ),
        ({0: LINK}, 0, "worker 0 lost the others: [gloo/", "worker lost"),
        (
            {0: WorkerHealthCheckTimeoutError("no answer for 600 s")},
            0,
            "worker 0 was lost: its process is there, and answers no more: it is stopped, or its node",
            "worker lost",
        ),
        ({0: LINK, 1: DataError("no row.", where="data")}, 1, "data: no row.", "data"),
        ({1: SpecError("a key.")}, 1, "a key.", "config"),
        ({1: ModelError("no base.")}, 1, "no base.", "config"),
        ({1: LINK, 0: StorageError("the disk is full.")}, 0, "the disk is full.", "storage"),
        ({1: LINK, 0: NotFiniteError("the loss of step 3 is nan")}, 0, "the loss of step 3 is nan", "NaN"),
        ({0: LeaseError("taken over.")}, 0, "taken over.", "error"),
        (
            {0: LOST, 1: RuntimeError("CUDA out of memory. Tried 2 GiB")},
            1,
            "ran out of memory",
            "out of memory",
        ),
        (
            {0: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")},
            0,
            "worker 0 ran out of memory: DefaultCPUAllocator",
            "out of memory",
        ),
        ({0: MemoryError()}, 0, "worker 0 ran out of memory: MemoryError", "out of memory"),
        ({0: LINK, 1: PREEMPTED}, 1, "worker 1 was taken away with its node", "preemption"),
        (
            {0: LINK, 1: WorkerHealthCheckFailedError("A worker health check failed.", PREEMPTED)},
            1,
            "worker 1 was taken away with its node",
            "preemption",
        ),
        ({2: KeyError("x"), 1: LINK}, 2, "worker 2 failed with KeyError: 'x'", "error"),
    ],
)
def test_the_cause_goes_before_its_consequences(failures, rank, words, kind):
    failure = failure_of(WorkerGroupError("two failed", failures))
    assert (failure.rank, failure.kind) == (rank, FailureKind(kind))
    assert words in failure.cause and "\n" not in failure.cause


@pytest.mark.parametrize("failures", [{0: LINK}, {0: LINK, 1: LOST}, {1: KILLED}])
def test_a_worker_that_went_with_its_node_says_so(failures):
    failure = failure_of_ranks(failures, {1: "10.0.0.7 (ab12)"})
    assert (failure.kind, failure.rank) == (FailureKind.NODE_LOST, 1)
    assert failure.cause == "node 10.0.0.7 (ab12), on which worker 1 was, does not answer."


def test_several_workers_and_nodes_are_counted():
    failure = failure_of_ranks({0: LINK}, {1: "a", 2: "a", 3: "b"})
    assert failure.cause == "node a, on which workers 1, 2 were, does not answer, and 1 more node."


def test_an_error_of_a_worker_is_not_blamed_on_a_node():
    assert failure_of_ranks({0: DataError("no row.")}, {1: "a"}).kind == FailureKind.DATA
    assert failure_of_ranks({0: KeyError("x")}, {1: "a"}).kind == FailureKind.ERROR


@pytest.mark.parametrize(
    ("error", "words", "kind"),
    [
        (ControllerError(WorkerGroupStartupTimeoutError(2)), "the workers did not start", "worker lost"),
        (ControllerError(KILLED), "what leads the workers was lost: its process ended", "worker lost"),
        (KILLED, "what leads the workers was lost: its process ended", "worker lost"),
        (ControllerError(ValueError("a bug")), "Ray Train failed: a bug", "error"),
    ],
)
def test_the_controllers_own_failures(error, words, kind):
    failure = failure_of(error)
    assert (failure.rank, failure.kind) == (None, FailureKind(kind)) and words in failure.cause
    assert failure_of(error, {0: "a"}).kind == FailureKind.NODE_LOST


def test_a_users_error_stays_what_it_is():
    error = TrainingError("the loss of step 3 is nan", hint="Lower training.learning_rate.")
    assert failure_of_ranks({0: error}).error is error


def test_one_line():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert len(one_line(ValueError("x" * 1000))) == 300
