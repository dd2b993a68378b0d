"""What a storage failed to do is tried again, unless that is of no use."""

from __future__ import annotations

import errno
import os

import pytest

from orchestrator import objects
from orchestrator.errors import LeaseError, StorageError
from orchestrator.objects.failures import explained


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    took: list[float] = []
    monkeypatch.setattr(objects.again.time, "sleep", took.append)
    return took


class Failing:
    """Fails the first `times`."""

    def __init__(self, times: int, error: Exception) -> None:
        self.times, self.error, self.calls = times, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "done"


def os_error(number: int) -> StorageError:
    return explained(OSError(number, os.strerror(number)), "/there")


@pytest.mark.parametrize("times", [0, 1, 3])
def test_what_passes_is_got_over(pauses, times):
    action = Failing(times, os_error(errno.EIO))
    assert objects.persistently(action) == "done" and action.calls == times + 1
    assert pauses == [0.5, 2.0, 6.0][:times]


def test_what_stays_is_told(pauses):
    action = Failing(9, os_error(errno.ENOSPC))
    with pytest.raises(StorageError, match=r"the disk is full\. Free some space"):
        objects.persistently(action)
    assert action.calls == 4 and sum(pauses) == 8.5


class Refused(Exception):
    """As botocore tells of a bucket that is not there."""

    response = {"Error": {"Code": "NoSuchBucket"}}  # noqa: RUF012


@pytest.mark.parametrize(
    "error",
    [
        os_error(errno.EROFS),
        os_error(errno.EACCES),
        os_error(errno.ENOENT),
        explained(Refused(), "s3://there/x", "there"),
        LeaseError("another driver has it."),
    ],
    ids=["read-only", "no permission", "not there", "no bucket", "lease"],
)
def test_what_another_try_cannot_mend_is_told_at_once(pauses, error):
    action = Failing(9, error)
    with pytest.raises(type(error)):
        objects.persistently(action)
    assert action.calls == 1 and pauses == []


def test_who_is_never_first_is_told_after_so_many_turns(pauses):
    taken = []
    with pytest.raises(
        StorageError, match=r"/there: too many others are changing this at once\. Try again\."
    ):
        for turn in objects.turns("/there", 30, pause_s=0.01, longest_s=0.5):
            taken.append(turn)
    assert taken == list(range(30)) and len(pauses) == 30
    assert all(0 <= pause <= min(0.01 * 1.3**turn, 0.5) for turn, pause in enumerate(pauses))


def test_who_was_first_pauses_no_more(pauses):
    assert next(turn for turn in objects.turns("/there", 30) if turn == 2) == 2
    assert len(pauses) == 2
