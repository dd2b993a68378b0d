"""Python's search for garbage, in a process that answers."""

from __future__ import annotations

import gc

_RARER = 10


def collect_rarely() -> None:
    """Lets Python look through all that it has a tenth as often, and never again through what is there now.

    Each look stops every thread, for 150 ms where fifty adapters are; with the usual thresholds one adapter in five
    that comes brings one about.
    """
    gc.collect()
    gc.freeze()
    newest, middle, oldest = gc.get_threshold()
    gc.set_threshold(newest, middle, _RARER * oldest)
