"""Work on a model while it serves: done by a thread of its own, but only while the thread that runs the steps waits.

An adapter takes longer to come or to go than a step of generation takes. `Slices` does such work a slice at a time:
between two steps, for as long as `give` says, and up to the next place where it may stop (`peft_dist.pauses`). One
piece of work follows the other, each whole before the next begins.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from peft_dist.pauses import pausing


class Slices:
    """A queue of work, of which the owner lets some be done now and then.

    Args:
        wake: called, by any thread, when there is work where there was none.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._queue: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._door = threading.Condition()
        self._given = False
        self._until = self._cpu_until = self._cpu = 0.0
        self._ended: BaseException | None = None
        self._at_work = False
        self._thread = threading.Thread(target=self._run, name="slices", daemon=True)
        self._thread.start()

    @property
    def has_work(self) -> bool:
        """Whether anything is begun or waits."""
        return self._at_work or bool(self._queue)

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Has it done after all that was submitted before; its result or its error is the future's. After `end` that
        is what `end` was given."""
        done: Future[Any] = Future()
        with self._door:
            ended = self._ended
            if ended is None:
                self._queue.append((work, done))
        if ended is None:
            self._wake()
        else:
            done.set_exception(ended)
        return done

    def give(self, seconds: float, cpu_seconds: float = math.inf) -> bool:
        """Lets work be done for about so long, and waits; False where there is none. The owner alone calls it.

        Args:
            cpu_seconds: of the working thread, at most: on a machine that others use too, a step's time is not its own.
        """
        with self._door:
            if not self.has_work:
                return False
            self._until, self._cpu = time.perf_counter() + seconds, cpu_seconds
            self._given = True
            self._door.notify_all()
            while self._given:
                self._door.wait()
        return True

    def end(self, error: BaseException) -> None:
        """Fails what waits; what was begun goes on to its end, without stopping."""
        with self._door:
            self._ended = error
            waiting, self._queue = self._queue, deque()
            self._door.notify_all()
        for _, done in waiting:
            if done.set_running_or_notify_cancel():
                done.set_exception(error)

    # --- in the thread that works

    def _run(self) -> None:
        while True:
            with self._door:
                while not (self._given and self._queue):
                    if self._ended is not None:
                        return
                    self._door.wait()
                work, done = self._queue.popleft()
                if not done.set_running_or_notify_cancel():
                    self._given = bool(self._queue)
                    self._door.notify_all()
                    continue
                self._at_work = True
            self._cpu_until = time.thread_time() + self._cpu
            try:
                with pausing(self._stop):
                    result = work()
            except BaseException as error:
                self._hand_back()
                done.set_exception(error)
            else:
                self._hand_back()
                done.set_result(result)
            del work, done

    def _stop(self) -> None:
        has_time = time.perf_counter() < self._until and time.thread_time() < self._cpu_until
        if has_time or self._ended is not None:
            return
        with self._door:
            self._given = False
            self._door.notify_all()
            while not self._given and self._ended is None:
                self._door.wait()
        self._cpu_until = time.thread_time() + self._cpu

    def _hand_back(self) -> None:
        with self._door:
            self._at_work = self._given = False
            self._door.notify_all()
