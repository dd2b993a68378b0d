"""Keys that a later version will have: named, so that nobody wonders whether they were misspelt."""

from __future__ import annotations

from .places import Path

LATER: dict[str, str] = {
}
"""Dotted key -> what to do in this version."""

LATER_FLAT: dict[str, str] = {
}
"""Keys of other projects at the top level that ask for the same."""

_SAYS = "this version does not have it yet."


def not_yet(path: Path) -> tuple[str, str] | None:
    """Problem and hint for a key that this version does not have yet, or for one below it; else None."""
    keys = [part for part in path if isinstance(part, str)]
    for size in range(1, len(keys) + 1):
        if hint := LATER.get(".".join(keys[:size])):
            return _SAYS, hint
    return None


def not_yet_flat(key: str) -> tuple[str, str] | None:
    """Likewise for another project's key at the top level."""
    return (_SAYS, LATER_FLAT[key]) if key in LATER_FLAT else None
