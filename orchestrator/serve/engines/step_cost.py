"""What a step of the batch costs by the tokens in it, as the last steps of that size were. No torch, no clock."""

from __future__ import annotations

import statistics
from collections import deque

_STEPS = 32
_LEAST, _MOST = 4, 4096


class StepCost:
    """Steps by how many tokens they had, in powers of two: what more of them cost is no straight line."""

    def __init__(self) -> None:
        self._took: dict[int, deque[float]] = {}

    def took(self, tokens: int, seconds: float) -> None:
        """Notes a step."""
        self._took.setdefault(tokens.bit_length(), deque(maxlen=_STEPS)).append(seconds)

    def addable(self, tokens: int, share: float) -> int:
        """How many tokens, in powers of two, may join a step of so many, that it takes longer by this share at most. A
        size that never ran is tried where the one below it is cheap enough; 4 are always allowed."""
        alone = self._usual(tokens)
        if alone is None:
            return _LEAST
        num = _LEAST
        while num < _MOST:
            then = self._usual(tokens + 2 * num)
            if then is not None and then > (1 + share) * alone:
                break
            num *= 2
            if then is None:
                break
        return num

    def _usual(self, tokens: int) -> float | None:
        seconds = self._took.get(tokens.bit_length())
        return None if seconds is None else statistics.median(seconds)
