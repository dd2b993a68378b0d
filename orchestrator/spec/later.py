"""Keys that a later version will have: named, so that nobody wonders whether they were misspelt."""

from __future__ import annotations

from .places import Path

_NO_PACKING = "Remove it: each row is a sequence of its own in this version."

LATER: dict[str, str] = {
    "data.sample_packing": _NO_PACKING,
    "sweep": "Remove it: run one job per setting, with --set training.learning_rate=1e-4 and the like.",
}
"""Dotted key -> what to do in this version."""

LATER_FLAT: dict[str, str] = {
    "sample_packing": _NO_PACKING,
    "eval_sample_packing": _NO_PACKING,
    "pad_to_sequence_len": _NO_PACKING,
    "packing": _NO_PACKING,
    "neat_packing": _NO_PACKING,
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
