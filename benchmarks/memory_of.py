"""What processes hold at their peak: `Sampler`, for the benchmarks of memory. Run by itself it measures nothing."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.merging.room import own_bytes

__all__ = ["Sampler", "own_bytes"]

LOOK_S = 0.2
"""Between two looks at which processes there are."""


class Sampler:
    """Samples the processes that `find` gives while its body runs; those that have ended hold nothing.

    Args:
        every_s: between two samples. kinds: as `own_bytes` takes them.

    Attributes:
        peaks: process -> the most bytes that it held. together: the most that all held at once.
    """

    def __init__(
        self,
        find: Callable[[], Iterable[int]],
        every_s: float = 0.01,
        kinds: tuple[str, ...] = ("RssAnon", "RssShmem"),
    ) -> None:
        self.peaks: dict[int, int] = {}
        self.together = 0
        self._find, self._every_s, self._kinds = find, every_s, kinds
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._sample(list(self._find()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        self._sample(list(self.peaks))

    def _run(self) -> None:
        pids, looked = list(self._find()), time.monotonic()
        while not self._ends.wait(self._every_s):
            if time.monotonic() - looked > LOOK_S:
                pids, looked = list(self._find()), time.monotonic()
            self._sample(pids)

    def _sample(self, pids: list[int]) -> None:
        held = {pid: self._held(pid) for pid in pids}
        self.together = max(self.together, sum(held.values()))
        for pid, size in held.items():
            self.peaks[pid] = max(self.peaks.get(pid, 0), size)

    def _held(self, pid: int) -> int:
        try:
            return own_bytes(pid, self._kinds)
        except OSError:
            return 0
