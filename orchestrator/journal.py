"""Files that only grow: events, metrics, logs. One writer each, any number of readers, also while it grows.

On this machine a file with lines appended. An object cannot be appended to: there it is numbered parts
(`URL.parts/000001`, ...), of which the writer rewrites the last until it is full; a reader sees one text.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from . import objects
from .objects import NotFound, join

_PART_BYTES = 256 << 10
_MOST_WAITING_BYTES = 8 << 20
_INTERVAL_S = 2.0
"""Seconds that appended text may wait before it is written to an object store."""


class Journal:
    """The writer. On object storage text waits up to two seconds for the next append, `flush` or `close`; on any,
    what could not be written waits for the next of them."""

    def __init__(self, url: str) -> None:
        self.url = objects.normal_url(url)
        self._parts = None if objects.is_local(url) else _Parts(self.url)
        self._file: int | None = None
        self._waiting = b""
        self._lock = threading.Lock()

    def append(self, data: bytes, *, flush: bool = False) -> None:
        """Adds `data` at the end.

        Raises:
            StorageError: full, read-only, no permission.
        """
        with self._lock:
            if self._parts is not None:
                self._parts.append(data, flush)
                return
            self._waiting = (self._waiting + data)[-_MOST_WAITING_BYTES:]
            self._write()

    def flush(self) -> None:
        """Writes what waits."""
        with self._lock:
            if self._parts is not None:
                self._parts.flush()
            elif self._waiting:
                self._write()

    def _write(self) -> None:
        with objects.explaining(self.url):
            if self._file is None:
                self._file = _open_at_line_start(Path(self.url))
            while self._waiting:  # a write to a nearly full disk may take only a part
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]

    def close(self) -> None:
        """Writes what waits and ends; a later `append` opens again."""
        self.flush()
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None


def read_lines(
    url: str, *, is_growing: Callable[[], bool] = lambda: False, poll_s: float = 0.5
) -> Iterator[str]:
    """The complete lines of a journal, without their ends; none where there is no such journal.

    Args:
        is_growing: asked each time that all was read; while it says yes, waits for more.
        poll_s: seconds between two looks.
    """
    reader = _LocalReader(url) if objects.is_local(url) else _PartsReader(url)
    rest = b""
    while True:
        go_on = is_growing()  # asked before reading, so that what is written last is read too
        *lines, rest = (rest + reader.more()).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
        if not go_on:
            break
        time.sleep(poll_s)
    if rest:
        yield rest.decode(errors="replace")


def _open_at_line_start(path: Path) -> int:
    """Opened for appending; a line that a killed writer left unfinished is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")
    return file


class _Parts:
    """The end of a journal on object storage."""

    def __init__(self, url: str) -> None:
        self.folder = f"{url}.parts"
        self.number: int | None = None
        self.last = b""
        self.is_written, self.is_new = True, True
        self.written_at = float("-inf")

    def append(self, data: bytes, flush: bool) -> None:
        self.last += data
        self.is_written = False
        if flush or time.monotonic() - self.written_at > _INTERVAL_S or len(self.last) > _PART_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.is_written:
            return
        if self.number is None:
            self.number = int(max(objects.list_(self.folder), default="0")) + 1
        if self.is_new:  # a writer that was overtaken may begin one too, and neither writes over the other's
            while not objects.create_if_absent(self._part(), self.last):
                self.number += 1
        else:
            objects.write(self._part(), self.last)
        self.is_written, self.is_new, self.written_at = True, False, time.monotonic()
        if len(self.last) > _PART_BYTES:
            self.number, self.last, self.is_new = self.number + 1, b"", True

    def _part(self) -> str:
        return join(self.folder, f"{self.number:06d}")


class _LocalReader:
    def __init__(self, url: str) -> None:
        self.path, self.offset = objects.local_path(url), 0

    def more(self) -> bytes:
        with objects.explaining(str(self.path)), contextlib.suppress(FileNotFoundError):
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read()
            self.offset += len(data)
            return data
        return b""


class _PartsReader:
    def __init__(self, url: str) -> None:
        self.folder, self.part, self.offset = f"{objects.normal_url(url)}.parts", "", 0

    def more(self) -> bytes:
        text = b""
        for part in objects.list_(self.folder):
            if part < self.part:
                continue
            try:
                data = objects.read(join(self.folder, part))[0]
            except NotFound:
                continue
            text += data[self.offset if part == self.part else 0 :]
            self.part, self.offset = part, len(data)
        return text
