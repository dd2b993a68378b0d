"""Which of two ways of taking the same steps is faster here: measured, by turns, while both do useful work."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["together", "turns"]

_ORDER: tuple[Mode, ...] = ("together", "turns", "together", "turns", "turns", "together")
"""The steps that are measured; the first of each warms up and does not count."""
_CLEARLY = 1.2
"""How much slower than the slowest of the other way its fastest is where two of each tell enough."""


@dataclass
class _Known:
    together: list[float] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)
    chosen: Mode | None = None


@dataclass(frozen=True)
class Kind:
    """Rounds that are measured as one."""

    facts: Hashable
    """What the speed of a run's steps follows from, of all of them."""
    size: int
    """Of the order of how many runs."""


class Pace:
    """The faster way of each kind of round. One forward over many is worth more the more they are: what is chosen for
    fewer holds for more where it is `together`, what is chosen for more holds for fewer where it is `turns`."""

    def __init__(self) -> None:
        self._known: dict[Kind, _Known] = {}

    def mode(self, kind: Kind) -> Mode:
        """How the next round of this kind is to run."""
        known = self._of(kind)
        return known.chosen or _ORDER[len(known.together) + len(known.turns)]

    def is_measuring(self, kind: Kind) -> bool:
        """Whether the next round of this kind is to be timed."""
        return self._of(kind).chosen is None

    def took(self, kind: Kind, mode: Mode, seconds_per_token: float) -> None:
        """Notes a round; once both ways were measured the faster is chosen."""
        known = self._of(kind)
        if known.chosen is not None:
            return
        getattr(known, mode).append(seconds_per_token)
        together, turns = known.together[1:], known.turns[1:]
        if not together or not turns:
            return
        is_clear = min(together) > _CLEARLY * max(turns) or min(turns) > _CLEARLY * max(together)
        if is_clear or len(known.together) + len(known.turns) == len(_ORDER):
            known.chosen = "together" if min(together) < min(turns) else "turns"

    def _of(self, kind: Kind) -> _Known:
        if kind not in self._known:
            self._known[kind] = _Known(chosen=self._foretold(kind))
        return self._known[kind]

    def _foretold(self, kind: Kind) -> Mode | None:
        for other, known in self._known.items():
            if other.facts == kind.facts and known.chosen is not None:
                holds_for_more = known.chosen == "together"
                if (kind.size > other.size) == holds_for_more:
                    return known.chosen
        return None
