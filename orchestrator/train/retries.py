"""What can end a group of workers, and how often `retry` lets a run start again after it. Pure: no Ray, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum

from orchestrator.spec.job import RetrySpec


class FailureKind(StrEnum):
    """Why a group of workers ended before its work did."""

    OUT_OF_MEMORY = "out of memory"
    DATA = "data"
    CONFIG = "config"
    WORKER_LOST = "worker lost"
    NODE_LOST = "node lost"
    STORAGE = "storage"
    PREEMPTION = "preemption"
    NAN = "NaN"
    ERROR = "error"
    """Anything else that a worker raised: the same rows and weights raise it again."""


BUDGETS = {
    FailureKind.WORKER_LOST: "worker_failure",
    FailureKind.NODE_LOST: "worker_failure",
    FailureKind.PREEMPTION: "preemption",
    FailureKind.OUT_OF_MEMORY: "oom",
}
"""The key of `retry` that a kind is charged to; a kind that is not here is never tried again."""


class Retries:
    """How often a run has been started again, against what its `retry` allows.

    Args:
        before: kind -> how often drivers before started it again after such a failure.
    """

    def __init__(self, retry: RetrySpec, before: Mapping[str, int] | None = None) -> None:
        self._retry, self._used = retry, Counter[str]()
        for kind, times in (before or {}).items():
            if key := BUDGETS.get(kind):  # type: ignore[call-overload]
                self._used[key] += times

    def allow(self, kind: FailureKind) -> bool:
        """Whether the run may start again after a failure of this kind; counts it where it may."""
        key = BUDGETS.get(kind)
        if key is None:
            return False
        most = getattr(self._retry, key)
        if most != "unlimited" and self._used[key] >= most:
            return False
        self._used[key] += 1
        return True

    def spent(self, kind: FailureKind) -> str | None:
        """One sentence on what was tried after failures of this kind; None where nothing was to be tried."""
        key = BUDGETS.get(kind)
        if key is None or not (used := self._used[key]):
            return None
        times = f"{used} time{'s' * (used > 1)}"
        return f"It was started again {times}, as often as retry.{key} allows; --resume counts anew."


def smaller_micro_batch(micro_batch_size: int) -> int:
    """The rows of a forward after memory ran out: half of them, one at least."""
    return max(1, micro_batch_size // 2)
