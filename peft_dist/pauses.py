"""Long work on a model that stops now and then: between two layers, where everybody else may run the model.

A base has hundreds of layers, and putting an adapter on it takes as long as a step of generation or longer. Whoever
serves from the base meanwhile runs that work in a thread of its own, under `pausing`; where it calls `pause`, the
model is such that other adapters are served from it as before. Without `pausing` nothing ever waits.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

_own = threading.local()


def pause() -> None:
    """Says that this thread's work may stop here for a while."""
    between = getattr(_own, "between", None)
    if between is not None:
        between()


@contextlib.contextmanager
def pausing(between: Callable[[], None]) -> Iterator[None]:
    """Within it `between` is called, by this thread, wherever its work may stop; it returns when the work is to
    go on."""
    before = getattr(_own, "between", None)
    _own.between = between
    try:
        yield
    finally:
        _own.between = before
