"""How many workers an elastic run has: with how many it starts, and when it grows. Pure; `attempts.py` asks Ray.

A run shrinks because workers are gone, and then starts with what there is room for. It grows only by leaving: its
workers commit a checkpoint and the next group, larger, goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence

STEADY_S = 2.0
"""How long room must have been there before a run leaves its workers for it."""

SETTLE_S = 5.0
"""How long a start waits for as many workers as the nodes can hold, while others still let go of theirs."""


def largest(counts: Sequence[int], places: int) -> int | None:
    """The largest of the counts for which there are places; None where not even the least has them."""
    return max((count for count in counts if count <= places), default=None)


def size_to_try(counts: Sequence[int], *, in_all: int, free: int, waited_s: float) -> int:
    """With how many workers to start now.

    Args:
        counts: the numbers of workers that the plan allows, ascending.
        in_all: workers that the nodes could hold were they empty.
        free: workers for which there is room now.
        waited_s: since the start was first tried.
    """
    goal = largest(counts, in_all) or counts[0]
    if waited_s < SETTLE_S:
        return goal
    return largest(counts, free) or counts[0]


class Growth:
    """When a run that has fewer workers than it may have leaves to get more.

    Args:
        interval_s: the least time between two growths.
    """

    def __init__(self, counts: Sequence[int], interval_s: float) -> None:
        self._counts, self._interval_s = tuple(counts), interval_s
        self._grew_at = self._seen_at = float("nan")
        self._seen = 0

    def is_due(self, current: int, now: float) -> bool:
        """Whether a growth would be allowed now, were there room."""
        since = now - self._grew_at
        return current < self._counts[-1] and not since < self._interval_s

    def size(self, current: int, places: int, now: float) -> int | None:
        """The size to grow to now; None to stay. Room counts once it has been there for `STEADY_S`.

        Args:
            current: workers that step.
            places: workers for which there is room, those that step included.
            now: seconds on a clock that never goes back.
        """
        size = largest(self._counts, places)
        if size is None or size <= current or not self.is_due(current, now):
            self._seen = 0
            return None
        if size != self._seen:
            self._seen, self._seen_at = size, now
            return None
        return size if now - self._seen_at >= STEADY_S else None

    def grew(self, now: float) -> None:
        """Notes that workers have been asked to leave for more."""
        self._grew_at, self._seen = now, 0
