"""Documents as they are stored: JSON with `format`, so that an older one is read and a newer one refused.

JSON has no NaN and no infinity, and metrics do: stored as the strings "NaN", "Infinity", "-Infinity".
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from .errors import StorageError

FORMAT = 1
_RESTORE = "Restore it from a backup, or move it away."


def dump(document: dict[str, Any]) -> bytes:
    """`document` with its format, as readable JSON."""
    whole = {"format": FORMAT, **finite(document)}
    return json.dumps(whole, default=str, indent=2, ensure_ascii=False, allow_nan=False).encode()


def dump_line(document: dict[str, Any]) -> bytes:
    """`document` as one line of a .jsonl file, its end included."""
    return json.dumps(finite(document), default=str, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def load(data: bytes, url: str) -> dict[str, Any]:
    """The document that `dump` wrote.

    Raises:
        StorageError: damaged, or written in a newer format.
    """
    try:
        document = json.loads(data)
    except ValueError as error:
        raise StorageError(f"this file is damaged: {error}.", where=url, hint=_RESTORE) from error
    if not isinstance(document, dict) or not isinstance(document.get("format", FORMAT), int):
        raise StorageError("this file is damaged: it is not a document of raypeft.", where=url, hint=_RESTORE)
    if document.get("format", FORMAT) > FORMAT:
        raise StorageError(
            f"a newer raypeft wrote this: format {document['format']}, and this one reads up to {FORMAT}.",
            where=url,
            hint="Upgrade: pip install -U raypeft.",
        )
    return document


@contextlib.contextmanager
def reading(url: str) -> Iterator[None]:
    """Within it a document of `url` that lacks something, or has another thing there, is a StorageError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise StorageError(f"this file is damaged: {what}.", where=url, hint=_RESTORE) from error


def known(kind: Any, document: Mapping[str, Any]) -> dict[str, Any]:
    """What of `document` the dataclass `kind` has a field for: an older or a newer raypeft may have written it."""
    return {each.name: document[each.name] for each in fields(kind) if each.name in document}


def finite(value: Any) -> Any:
    """`value` with each number that JSON cannot hold replaced by its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Stored metrics as numbers again."""
    return {name: float(value) for name, value in metrics.items()}
