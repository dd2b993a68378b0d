"""A rate: so much a minute, saved up for at most a minute."""

from __future__ import annotations

import math

_NOTHING_S = 1e-6
"""Less than a rounding error of sums of floats: nobody waits for it."""


class TokenBucket:
    """Fills at `per_minute` a minute up to one minute's worth.

    More than a minute's worth at once is let through when the bucket is full, and paid back before the next.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._per_minute = per_minute
        self._level, self._at = float(per_minute), now

    def set_rate(self, per_minute: float, now: float) -> None:
        """Another rate from now on; what was taken stays taken."""
        if per_minute == self._per_minute:
            return
        self._fill(now)
        self._level += per_minute - self._per_minute
        self._per_minute = per_minute

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; 0: now."""
        self._fill(now)
        if self._per_minute <= 0:
            return math.inf
        wait = (min(amount, self._per_minute) - self._level) / self._per_minute * 60
        return wait if wait > _NOTHING_S else 0.0

    def take(self, amount: float, now: float) -> None:
        """Takes `amount`, also what is not there; a negative amount is given back."""
        self._fill(now)
        self._level = min(self._level - amount, self._per_minute)

    def _fill(self, now: float) -> None:
        grown = self._per_minute * max(0.0, now - self._at) / 60
        self._level = min(self._per_minute, self._level + grown)
        self._at = max(self._at, now)
