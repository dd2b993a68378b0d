"""What a driver tells trackers, from a thread and through a bounded queue to a process that does the writing.

    with open_tracking(targets) as tracking:
        sweep = tracking.run("sweep-1", params={...})
        trial = tracking.run("sweep-1-3", parent=sweep, params={...})
        trial.metrics(10, {"loss": 0.5})
        trial.end("finished")

Nothing here raises or waits: a tracker that is down is told of once, in `warnings`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

COMMAND = (sys.executable, "-m", "orchestrator.tracking.process")
"""What writes."""

MOST_WAITING = 10_000
"""Messages that wait for the process; more are left out."""

_SILENT_S = 3.0
"""How long it waits for a server that has not answered once."""

ENDS_WITHIN_S = 20.0
"""How long `close` waits for trackers that work. Those that do not are left behind at once."""

Target = Mapping[str, Any]
"""What one tracker needs, as plain values; `kind` is a key of `process.SINKS`."""


class Tracking:
    """The trackers of one driver: any number of runs, nested or not, from any thread.

    Args:
        targets: where to; none: everything is accepted and nothing is done.
        env: variables of the process beside this one's own, such as keys of the trackers.
        ends_within_s: how long `close` waits.
    """

    def __init__(
        self,
        targets: Sequence[Target] = (),
        *,
        env: Mapping[str, str] | None = None,
        ends_within_s: float = ENDS_WITHIN_S,
    ) -> None:
        self.targets = tuple(targets)
        self._ends_within_s = ends_within_s
        self._queue: queue.Queue[str | None] = queue.Queue(MOST_WAITING)
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._is_down, self._left_out, self._closed = False, 0, False
        self._has_answered = False
        self._lock, self._started = threading.Lock(), False
        self.process: subprocess.Popen[str] | None = None
        self.env = {**os.environ, **(env or {})}
        self._feeder = threading.Thread(target=self._feed, name="tracking", daemon=True)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(
        self,
        key: str,
        *,
        name: str | None = None,
        parent: TrackedRun | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """A run of the trackers: the one of this key that there is, or a new one.

        Args:
            key: what tells it from all others of its experiment; the same again goes on with it.
            name: as it is shown; the key where not given.
            parent: the run that it is nested in, such as a trial in its sweep.
            params: what it was given, by dotted key. tags: what else is known of it.

        The process starts with the first run.
        """
        with self._lock:
            if self.targets and not self._closed and not self._started:
                self._started = True
                self._put({"targets": list(self.targets)})
                self._feeder.start()
        self._put({
            "op": "start", "key": key, "name": name or key, "parent": parent.key if parent else None,
            "params": dict(params or {}), "tags": dict(tags or {}),
        })  # fmt: skip
        return TrackedRun(self, key)

    def warnings(self) -> list[str]:
        """What went wrong since the last call, a sentence each."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._said.get_nowait())
        return found

    def close(self) -> None:
        """Has what waits written, and ends. Trackers that do not answer are not waited for."""
        if self._closed:
            return
        self._closed = True
        if not self._started:
            return
        silent = any(_is_far(target) for target in self.targets) and not self._has_answered
        until = time.monotonic() + min(self._ends_within_s, _SILENT_S if silent else math.inf)
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=1)
        while not self._is_down and time.monotonic() < until:
            self._feeder.join(0.05)
            if not self._feeder.is_alive():
                break
        if self._left_out:
            self._said.put(f"{self._left_out} messages were left out: the trackers are too slow.")

    def kill(self) -> None:
        """Ends the process at once, whatever still waits in it."""
        if self.process is not None:
            self.process.kill()

    def _put(self, message: Mapping[str, Any]) -> None:
        if not self._started or self._closed:
            return
        try:
            self._queue.put_nowait(json.dumps({**message, "t": time.time()}, default=str))
        except queue.Full:
            self._left_out += 1

    def _feed(self) -> None:
        """The thread: starts the process, hands it what comes, and waits for its end."""
        try:
            self.process = _start(self.env)
        except OSError as error:
            self._warn(f"tracking: its process cannot be started: {error}.")
            return
        told, heard = self.process.stdin, self.process.stdout
        assert told is not None and heard is not None
        listener = threading.Thread(target=self._listen, args=(heard,), name="tracking-says", daemon=True)
        listener.start()
        with contextlib.suppress(OSError, ValueError):  # it died; the listener says so
            while (line := self._queue.get()) is not None:
                told.write(line + "\n")
                if self._queue.empty():
                    told.flush()
        with contextlib.suppress(OSError, ValueError):
            told.close()
        listener.join()
        self.process.wait()

    def _listen(self, heard: IO[str]) -> None:
        ended = False
        for line in heard:
            try:
                said = json.loads(line)
            except ValueError:  # a library that prints
                continue
            self._has_answered = self._has_answered or bool(said.get("answered"))
            if "warning" in said:
                self._warn(said["warning"], is_down=said.get("down", True))
            ended = ended or bool(said.get("ended"))
        if not ended:
            self._warn("tracking: its process died, and nothing more is tracked.")

    def _warn(self, text: str, is_down: bool = True) -> None:
        self._is_down = self._is_down or is_down
        self._said.put(text)


class TrackedRun:
    """One run of the trackers. Whatever is told twice of one step is told once."""

    def __init__(self, tracking: Tracking, key: str) -> None:
        self.tracking, self.key = tracking, key
        self._last: dict[str, int] = {}

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers at an optimizer step; those of a step that was repeated after a failure are known already."""
        fresh = {name: value for name, value in values.items() if step > self._last.get(name, -1)}
        if fresh:
            self._last.update(dict.fromkeys(fresh, step))
            self.tracking._put({"op": "metrics", "key": self.key, "step": step, "values": fresh})

    def tags(self, tags: Mapping[str, str]) -> None:
        """What became known of the run: its version, its parent."""
        self.tracking._put({"op": "tags", "key": self.key, "tags": dict(tags)})

    def text(self, file: str, content: str) -> None:
        """A small text file beside the run: its job, its lineage."""
        self.tracking._put({"op": "text", "key": self.key, "file": file, "content": content})

    def end(self, status: str = "finished") -> None:
        """The run is over: `finished`, `failed` or `killed`; the same key goes on with it later."""
        self.tracking._put({"op": "end", "key": self.key, "status": status})


def _is_far(target: Target) -> bool:
    """Whether a server is to answer."""
    return target.get("mode") == "online" or str(target.get("uri", "")).startswith("http")


def _start(env: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=dict(env),
        start_new_session=True,  # Ctrl-C is for the run; what waits is still written
    )
