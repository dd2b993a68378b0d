"""The process beside a driver that alone imports trackers' libraries: lines of JSON in, warnings out.

It reads all that comes at once and writes what it can, each tracker in a thread of its own. It leaves when the
driver does, within a bound.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import sys
import threading
import time
from collections import deque
from typing import Any

from .sink import Sink

SINKS = {
    "mlflow": "orchestrator.tracking.mlflow_runs:MlflowRuns",
    "tensorboard": "orchestrator.tracking.tensorboard_files:TensorboardFiles",
    "wandb": "orchestrator.tracking.wandb_runs:WandbRuns",
}
"""Kind -> "module:class", imported when a driver asks for it."""

DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
}
"""Of the libraries' own variables, where the user has not set them: short patience, and no talk."""

MOST_WAITING = 50_000
TRIES_AGAIN_S = 15.0
GATHERS_S = 0.3
"""How long metrics are gathered, to be sent together."""
_AT_ONCE, _TRIES = 500, 3
_LONGEST_REASON = 300
LEAVES_AFTER_S = 60.0
"""How long after the driver's end a tracker may take for what still waits."""


class Feed(threading.Thread):
    """One tracker: what waits for it, in order, tried again where it fails, and its one warning."""

    def __init__(self, target: dict[str, Any]) -> None:
        super().__init__(name=target["kind"], daemon=True)
        self.target = target
        self.waiting: deque[dict[str, Any]] = deque(maxlen=MOST_WAITING)
        self._ended, self._wake, self._warned = threading.Event(), threading.Event(), False
        self._answered = False
        self._failed: tuple[int, int] = (0, 0)

    def take(self, message: dict[str, Any]) -> None:
        """One more message; the oldest is forgotten where too many wait."""
        self.waiting.append(message)
        self._wake.set()

    def end(self) -> None:
        """No more messages come."""
        self._ended.set()
        self._wake.set()

    def run(self) -> None:
        sink: Sink | None = None
        while True:
            self._wake.wait()
            if not self._ended.is_set():
                time.sleep(GATHERS_S)
            self._wake.clear()
            is_last = self._ended.is_set()
            try:
                if sink is None:
                    sink = _opened(self.target)
                self._write_all(sink)
                if not self._answered:
                    say({"answered": self.target["kind"]})
                self._answered = True
                if is_last:
                    sink.close()
            except Exception as error:  # whatever a library or a network does: the run goes on
                self._warn(error)
                if not is_last:
                    self._ended.wait(TRIES_AGAIN_S)
                    self._wake.set()
            if is_last:
                return

    def _write_all(self, sink: Sink) -> None:
        while self.waiting:
            batch = self._next()
            try:
                sink.write(batch)
            except Exception:
                if not self._is_hopeless(batch[0]):
                    raise
            for _ in batch:
                self.waiting.popleft()

    def _is_hopeless(self, message: dict[str, Any]) -> bool:
        """Whether the same message has failed so often that those behind it are to have their turn."""
        which, times = self._failed
        self._failed = (id(message), times + 1 if which == id(message) else 1)
        return self._failed[1] >= _TRIES and message["op"] != "start"

    def _next(self) -> list[dict[str, Any]]:
        """The next message, or neighbouring metrics of one run together."""
        messages = list(itertools.islice(self.waiting, _AT_ONCE))
        first = messages[0]
        if first["op"] != "metrics":
            return [first]
        return list(
            itertools.takewhile(
                lambda each: each["op"] == "metrics" and each["key"] == first["key"], messages
            )
        )

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            reason = " ".join(str(error).split()) or type(error).__name__
            reason = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}..."
            say(
                {
                    "warning": f"tracking.{self.target['kind']}: {reason} The run goes on, untracked until it answers."
                }
            )
        self._warned = True


def _opened(target: dict[str, Any]) -> Sink:
    module, name = SINKS[target["kind"]].split(":")
    options = {key: value for key, value in target.items() if key != "kind"}
    return getattr(importlib.import_module(module), name)(**options)


_OUT = sys.stdout
_LOCK = threading.Lock()


def say(message: dict[str, Any]) -> None:
    """A line for the driver, where it is still there."""
    with _LOCK, contextlib.suppress(OSError, ValueError):
        _OUT.write(json.dumps(message) + "\n")
        _OUT.flush()


def main() -> None:
    """Reads until the driver closes its end, then leaves once all is written or time is over."""
    with contextlib.suppress(OSError):
        os.nice(5)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    sys.stdout = sys.stderr  # what libraries print is nobody's
    first = sys.stdin.readline()
    feeds = [Feed(target) for target in json.loads(first)["targets"]] if first.strip() else []
    for feed in feeds:
        feed.start()
    for line in sys.stdin:
        message = json.loads(line)
        for feed in feeds:
            feed.take(message)
    for feed in feeds:
        feed.end()
    until = time.monotonic() + LEAVES_AFTER_S
    for feed in feeds:
        feed.join(max(0.0, until - time.monotonic()))
    say({"ended": True})
    sys.stderr.flush()
    os._exit(0)  # a library's thread that still waits for its server keeps nobody


if __name__ == "__main__":
    main()
