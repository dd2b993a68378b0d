"""Which of two ways of taking the same steps is faster here: measured, by turns, while both do useful work."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["together", "turns"]

_ORDER: tuple[Mode, ...] = ("together", "turns", "together", "turns", "turns", "together")
"""The steps that are measured; the first of each warms up and does not count."""


@dataclass
class _Known:
    together: list[float] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)
    chosen: Mode | None = None


class Pace:
    """The faster way of each kind of round."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _Known] = {}

    def mode(self, kind: Hashable) -> Mode:
        """How the next round of this kind is to run."""
        known = self._known.setdefault(kind, _Known())
        taken = len(known.together) + len(known.turns)
        return known.chosen or _ORDER[taken]

    def is_measuring(self, kind: Hashable) -> bool:
        """Whether the next round of this kind is to be timed."""
        return self._known.setdefault(kind, _Known()).chosen is None

    def took(self, kind: Hashable, mode: Mode, seconds_per_token: float) -> None:
        """Notes a round; once both ways were measured the faster is chosen."""
        known = self._known.setdefault(kind, _Known())
        if known.chosen is not None:
            return
        getattr(known, mode).append(seconds_per_token)
        if len(known.together) + len(known.turns) == len(_ORDER):
            known.chosen = "together" if min(known.together[1:]) < min(known.turns[1:]) else "turns"

    def refuse(self, kind: Hashable) -> None:
        """Notes that rounds of this kind cannot run together."""
        self._known[kind] = _Known(chosen="turns")
