"""Whose turn it is: the queue that has been served the fewest tokens.

Each queue has a counter of tokens, divided by its weight. A queue that comes back from having nothing to do
starts at the least counter of those that have, so that nobody saves up turns by waiting. No torch, no clock.

Turns alone do not keep a flood from filling the batch, whose steps then take everybody longer: while others have
something to do, or had a moment ago, a queue has no more places than all of them together, and at least a few. And
prompts of a queue that is `late` are to be read a few tokens a step, behind everybody else's.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")

_LEAST = 4
"""Places that a queue may have whatever the others do."""
_MOMENT = 512
"""Tokens served in all, for which one that had nothing more to do counts as if it still had."""


class FairQueue(Generic[T]):
    """Things that wait, each in a queue of its own name.

    `pop` gives the first of the queue that was served least; `served` says what one was served; `leave` that
    one of its things is done.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._running: dict[str, int] = {}
        self._counters: dict[str, float] = {}
        self._served = 0
        self._most: dict[str, int] = {}
        self._gone: dict[str, tuple[int, int]] = {}
        """Of those that had something to do lately: how many places at most, and when that ended."""

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    def push(self, queue: str, item: T) -> None:
        """Puts a thing at the end of its queue."""
        self._gone.pop(queue, None)
        if queue not in self._counters:
            self._counters[queue] = min(self._counters.values(), default=0.0)
        self._waiting.setdefault(queue, deque()).append(item)

    def pop(self) -> tuple[str, T] | None:
        """The queue whose turn it is and its first thing, which runs from now on until `leave`; None where nothing
        waits, or nothing may have more places now."""
        self._gone = {name: past for name, past in self._gone.items() if self._served - past[1] < _MOMENT}
        everyone = sum(self._running.values()) + len(self) + sum(most for most, _ in self._gone.values())
        ready = [name for name in self._waiting if self._may_run(name, everyone)]
        if not ready:
            return None
        queue = min(ready, key=lambda name: self._counters[name])
        items = self._waiting[queue]
        item = items.popleft()
        if not items:
            del self._waiting[queue]
        self._running[queue] = self._running.get(queue, 0) + 1
        self._most[queue] = max(self._most.get(queue, 0), self._running[queue])
        return queue, item

    def _may_run(self, queue: str, everyone: int) -> bool:
        """Whether one more of a queue may run beside what others do, want to do, or did a moment ago.

        Args:
            everyone: how many places all queues together have, want, or had a moment ago.
        """
        running = self._running.get(queue, 0)
        others = everyone - running - len(self._waiting[queue])
        return not others or running < max(_LEAST, others)

    def late(self) -> frozenset[str]:
        """The queues that have more to do than they may at once, where another has, or had a moment ago, all that it
        wants: what they do is to be hardly noticed by that one."""
        calm = any(name not in self._waiting for name in self._running) or any(
            self._served - past[1] < _MOMENT for past in self._gone.values()
        )
        return frozenset(self._waiting) if calm else frozenset()

    def remove(self, queue: str, item: T) -> bool:
        """Takes a thing out that waits; whether it did."""
        items = self._waiting.get(queue)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._waiting[queue]
        self._forget(queue)
        return True

    def served(self, queue: str, tokens: int, weight: float = 1.0) -> None:
        """Counts tokens that were computed for a thing of this queue."""
        self._served += tokens
        if queue in self._counters:
            self._counters[queue] += tokens / weight

    def leave(self, queue: str) -> None:
        """One of its things that ran is done."""
        left = self._running.get(queue, 0) - 1
        if left > 0:
            self._running[queue] = left
        else:
            self._running.pop(queue, None)
            self._forget(queue)

    def waiting(self) -> dict[str, int]:
        """How many things wait in each queue that has any."""
        return {name: len(items) for name, items in self._waiting.items()}

    def _forget(self, queue: str) -> None:
        if queue not in self._waiting and queue not in self._running:
            self._counters.pop(queue, None)
            if most := self._most.pop(queue, 0):
                self._gone[queue] = (most, self._served)
