"""What signals do while a call is under way."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def handled(numbers: tuple[signal.Signals, ...], call: Callable[[], object]) -> Iterator[None]:
    """Within the context each of these signals calls `call`. Off the main thread they stay the program's own."""
    try:
        before = {number: signal.signal(number, lambda *_: call()) for number in numbers}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt() -> None:
    """Ends what runs as Ctrl-C does."""
    raise KeyboardInterrupt
