"""The sequences of an engine: any thread asks for one, the engine's own takes them in turn until they are answered."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

from .engine import EngineDead
from .fair import FairQueue
from .live_sequence import LiveSequence


class Turns:
    """Who waits, whose turn it is, and who runs.

    Args:
        wake: called, by any thread, when there is something to do.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self.by_name: dict[str, LiveSequence] = {}
        """All that are not answered. The engine's thread alone reads it."""
        self._fair: FairQueue[LiveSequence] = FairQueue()
        self._left: deque[LiveSequence] = deque()
        self._door = threading.Lock()
        self._ended: EngineDead | None = None

    # --- from any thread

    def ask(self, sequence: LiveSequence) -> None:
        """Has it wait for its turn.

        Raises:
            EngineDead: nobody gives it one any more.
        """
        with self._door:
            if self._ended is not None:
                raise EngineDead(str(self._ended))
            self.by_name[sequence.name] = sequence
            self._fair.push(sequence.queue, sequence)
        self._wake()

    def leave(self, sequence: LiveSequence) -> None:
        """Says that nobody listens to it any more, answered or not."""
        self._left.append(sequence)
        self._wake()

    @property
    def has_news(self) -> bool:
        """Whether any wait, or have left."""
        return bool(self._left) or len(self._fair) > 0

    def counts(self) -> tuple[int, int]:
        """How many run and how many wait."""
        with self._door:
            return sum(each.runs for each in self.by_name.values()), len(self._fair)

    # --- in the engine's thread

    def left(self) -> Iterator[LiveSequence]:
        """Those of which `leave` was said, and that are not answered."""
        while self._left:
            sequence = self._left.popleft()
            if sequence.name in self.by_name:
                yield sequence

    def take(self) -> LiveSequence | None:
        """Whose turn it is, and who runs from now on; None where nobody waits or may run."""
        with self._door:
            popped = self._fair.pop()
        if popped is None:
            return None
        _, sequence = popped
        sequence.runs = True
        return sequence

    def late(self) -> Collection[str]:
        """See `FairQueue.late`."""
        with self._door:
            return self._fair.late()

    def served(self, tokens: Iterable[tuple[LiveSequence, int]]) -> None:
        """Counts the tokens that each had of a step against its queue."""
        with self._door:
            for sequence, num in tokens:
                self._fair.served(sequence.queue, num)

    def forget(self, sequence: LiveSequence) -> None:
        """One that is answered."""
        with self._door:
            self.by_name.pop(sequence.name, None)
            if sequence.runs:
                self._fair.leave(sequence.queue)
            else:
                self._fair.remove(sequence.queue, sequence)

    def end(self, error: EngineDead) -> None:
        """Refuses all that ask from now on; those that are here are left to whoever ends."""
        with self._door:
            self._ended = error
