"""What Ctrl-C asks for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from ..runner import Runner


class StopRequest:
    """What Ctrl-C asks for. While workers train, the first one has them save a checkpoint and leave; a second
    one, or one at any other time, raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self._asked, self._ended = threading.Event(), threading.Event()
        self._runner: Runner | None = None
        self.came = False
        """Whether it was asked for while workers trained, be it too late for them."""

    def ask(self) -> None:
        """Called by a signal handler, so it only raises or sets a flag."""
        if self._runner is None or self._asked.is_set():
            raise KeyboardInterrupt
        self.came = True
        self._asked.set()

    @contextlib.contextmanager
    def stops(self, runner: Runner) -> Iterator[None]:
        """Within the context, `ask` stops this runner."""
        watcher = threading.Thread(target=self._watch, args=(runner,), name="stop-request", daemon=True)
        self._runner = runner
        watcher.start()
        try:
            yield
        finally:
            self._runner = None
            self._ended.set()
            self._asked.set()

    def _watch(self, runner: Runner) -> None:
        self._asked.wait()
        if not self._ended.is_set():
            runner.stop()
