"""What a storage failed to do, or another was first to do, is tried again before a run is given up for it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..errors import StorageError

Result = TypeVar("Result")

PAUSES_S = (0.5, 2.0, 6.0)
"""Before the second, third and fourth try."""


def persistently(action: Callable[[], Result]) -> Result:
    """`action()`, which must be good for being called again after it failed half-way.

    Raises:
        StorageError: of the last try, or of one after which another would be of no use.
    """
    for pause_s in PAUSES_S:
        try:
            return action()
        except StorageError as error:
            if not error.may_pass:
                raise
            time.sleep(pause_s)
    return action()


def turns(url: str, most: int, *, pause_s: float = 0.02, longest_s: float = 1.0) -> Iterator[int]:
    """The tries, from 0, of changing what is at `url` by `replace_if`: leave the loop with the one that succeeded.

    Before each further one it waits at random, up to `pause_s` at first, 1.3 times that then, at most `longest_s`.

    Raises:
        StorageError: all `most` are used up.
    """
    for turn in range(most):
        yield turn
        time.sleep(random.uniform(0, min(pause_s * 1.3**turn, longest_s)))
    raise StorageError("too many others are changing this at once.", where=url, hint="Try again.")
