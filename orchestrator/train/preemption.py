"""SIGTERM to a worker asks its run for a checkpoint: the machine under it goes, and says so in advance.

Ray's own handler ends the process at once. Only a process's main thread may set a handler, and a training function
runs in another one: `listen` is called in the main thread before it begins (see `backend.py`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

_came = threading.Event()
_calls: list[Callable[[], None]] = []


def listen() -> None:
    """From now on SIGTERM calls what `when_asked` was given, and ends nothing. In the main thread alone."""
    _came.clear()
    _calls.clear()
    signal.signal(signal.SIGTERM, _ask)


def when_asked(call: Callable[[], None]) -> None:
    """Has `call` called when a SIGTERM comes, or at once where one came already. It sets a flag, nothing more."""
    _calls.append(call)
    if _came.is_set():
        call()


def _ask(number: int, frame: object) -> None:
    _came.set()
    for call in list(_calls):
        call()
