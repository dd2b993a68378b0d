"""What a storage failed to do is tried again before a run is given up for it."""

from __future__ import annotations

import time
from collections.abc import Callable
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
