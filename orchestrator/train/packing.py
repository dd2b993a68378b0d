"""How runs stand on one base, as the driver of a group tells its workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Way = Literal["auto", "together", "turns"]


@dataclass(frozen=True)
class Packing:
    """What holds for all runs that come and go."""

    way: Way = "auto"
    """together: one concatenated batch over all adapters, where the base and the tasks allow it; turns: the adapters
    one after the other; auto: whichever was measured to be faster for the runs that are there"""
    places: int | None = None
    """Runs that stand on the base at once; others wait in line, in their order. None sets no bound."""
    joined: int | None = None
    """Runs in one forward; None sets no bound. Where memory runs out all the same, half as many."""
