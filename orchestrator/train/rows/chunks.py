"""Rows in handfuls: tokenizers are faster on many texts at once, and a file need not be held whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
CHUNK = 512


def chunks(rows: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """The rows in order, `size` at a time."""
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk
