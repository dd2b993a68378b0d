"""A rendered row as `raypeft inspect` shows it."""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = -100
"""The label of what is no target."""


@dataclass(frozen=True)
class Outline:
    """The row's tokens, which of them are trained, and what else is told of it."""

    ids: list[int]
    trained: list[bool]
    note: str = ""
    prompt_len: int = 0
