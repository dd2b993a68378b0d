"""Storage that fails, is slow, is full, or under which the process dies, at the nth of its writes: deterministic.

`FaultyStorage` stands before each of the storages of `orchestrator.objects` while it is entered; `DyingOs` counts the
calls of the operating system by which the local one and the journals write.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from orchestrator import journal, objects
from orchestrator.errors import StorageError
from orchestrator.objects import local

WRITES = ("create", "replace", "write", "delete", "put_tree", "delete_tree")


class FaultyStorage:
    """Counts the writes of this process; the `nth` (from 1) fails, and with `lasting` all from then on.

    Args:
        done: whether it takes effect before it fails, as where only the answer is lost.
        delay_s: how long each write takes.
        meanwhile: called before the nth write, which then does not fail: what others do while this one hangs.
    """

    def __init__(
        self,
        nth: int | None = None,
        *,
        done: bool = False,
        lasting: bool = False,
        delay_s: float = 0.0,
        meanwhile: Callable[[], object] | None = None,
    ) -> None:
        self.nth, self.done, self.lasting, self.delay_s = nth, done, lasting, delay_s
        self.meanwhile, self.count = meanwhile, 0
        self.log: list[str] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[FaultyStorage]:
        """Within it every write of `objects` comes by here."""
        real = objects._objects
        objects._objects = lambda url: _Counted(real(url), self)  # type: ignore[assignment]
        try:
            yield self
        finally:
            objects._objects = real

    def write(self, name: str, path: str, act: Callable[[], Any]) -> Any:
        """One write, which fails where it is its turn."""
        self.count += 1
        self.log.append(f"{name} {path.rpartition('/')[2]}")
        time.sleep(self.delay_s)
        fails = self.nth is not None and (self.count == self.nth or (self.lasting and self.count > self.nth))
        if fails and self.meanwhile is not None:
            self.nth = None
            self.meanwhile()
            return act()
        if fails and not self.done:
            raise StorageError("the disk is full.", where=path)
        result = act()
        if fails:
            raise StorageError("the storage failed: the answer was lost.", where=path)
        return result


class _Counted:
    def __init__(self, storage: Any, faults: FaultyStorage) -> None:
        self._storage, self._faults = storage, faults

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._storage, name)
        if name not in WRITES:
            return real

        def counted(*arguments: Any) -> Any:
            path = next(str(each) for each in arguments if isinstance(each, str))
            return self._faults.write(name, path, lambda: real(*arguments))

        return counted


class DyingOs:
    """In place of the module `os` of the local storage and of journals: before the `nth` of the calls that change
    anything `act` is called, to end the process or to raise."""

    CALLS = ("link", "replace", "rename", "fsync", "rmdir", "mkdir", "unlink", "write")

    def __init__(self, nth: int | None, act: Callable[[], None]) -> None:
        self.nth, self.act, self.count = nth, act, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.CALLS:
            return real

        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.nth:
                self.act()
            return real(*arguments, **options)

        return counted

    @contextlib.contextmanager
    def installed(self) -> Iterator[DyingOs]:
        """Within it the local storage and journals call this."""
        places: tuple[ModuleType, ...] = (local, journal)
        for module in places:
            module.os = self  # type: ignore[attr-defined]
        try:
            yield self
        finally:
            for module in places:
                module.os = os  # type: ignore[attr-defined]


def dies_at(nth: int, act: Callable[[], None]) -> bool:
    """Runs `act` in a forked process that ends, as by SIGKILL, before its nth write; False where it made fewer."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with DyingOs(nth, lambda: os._exit(9)).installed():
                act()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), f"the process failed before it was to die: {code}"
    return code == 9
