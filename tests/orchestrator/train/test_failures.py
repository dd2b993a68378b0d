import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from orchestrator.errors import DataError, TrainingError
from orchestrator.train.failures import failure_of, one_line

LOST = WorkerHealthCheckFailedError(
    "A worker health check failed.", RayActorError(error_msg="The actor died.\nworker exit: SIGKILL")
)
LINK = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


KILLED = RayActorError(
    error_msg="The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit "
    "detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: "
    "(1) the process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called"
)


@pytest.mark.parametrize(
    ("failures", "rank", "words", "can_retry"),
    [
        ({0: LINK, 1: LOST}, 1, "worker 1 was lost: worker exit: SIGKILL", True),
        (
            {0: LINK, 1: KILLED},
            1,
            "worker 1 was lost: its process ended without a word: killed, out of the node's memory, or crashed.",
            True,
        ),
        ({0: LINK}, 0, "worker 0 lost the others: [gloo/", True),
        ({0: LINK, 1: DataError("no row.", where="data")}, 1, "data: no row.", False),
        (
            {0: LOST, 1: RuntimeError("CUDA out of memory. Tried 2 GiB")},
            1,
            "ran out of memory",
            False,
        ),
        ({0: MemoryError()}, 0, "worker 0 ran out of memory: MemoryError", False),
        ({2: KeyError("x"), 1: LINK}, 2, "worker 2 failed with KeyError: 'x'", False),
    ],
)
def test_the_cause_goes_before_its_consequences(failures, rank, words, can_retry):
    failure = failure_of(failures)
    assert failure.rank == rank and failure.can_retry == can_retry
    assert words in failure.cause and "\n" not in failure.cause


def test_a_users_error_stays_what_it_is():
    error = TrainingError("the loss of step 3 is nan", hint="Lower training.learning_rate.")
    assert failure_of({0: error}).error is error


def test_one_line():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert len(one_line(ValueError("x" * 1000))) == 300
