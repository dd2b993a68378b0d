"""Several adapters named in one request: `a:0.7+b@2:0.3`, each with its weight."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ..api_error import ApiError

MOST_PARTS = 16
_FORM = "Write NAME:WEIGHT+NAME:WEIGHT, such as docs:0.7+legal@2:0.3; a part without a weight has 1."


_BROKEN_OFF = re.compile(r".*:\s*-?[\d.]+[eE]")
"""What stands before a `+` that is part of a weight, as in `1e+06`; a name that ends in an `e` has no colon."""


def part_texts(model: str) -> list[str]:
    """What stands between the `+` of a request's `model`: whoever asks which adapters it names reads it so."""
    parts: list[str] = []
    for text in model.split("+"):
        if parts and _BROKEN_OFF.fullmatch(parts[-1]):
            parts[-1] += f"+{text}"
        else:
            parts.append(text)
    return [part.strip() for part in parts]


def parse_ensemble(model: str) -> list[tuple[str, float]] | None:
    """The parts of an ensemble, as they stand; None where `model` is one adapter's or the base's name.

    Raises:
        ApiError: a part without a name, a weight that is no finite number, too many parts.
    """
    if "+" not in model and ":" not in model:
        return None
    parts = []
    for text in part_texts(model):
        name, colon, weight = (part.strip() for part in text.partition(":"))
        try:
            number = float(weight) if colon else 1.0
        except ValueError:
            number = math.nan
        if not name or not math.isfinite(number):
            raise ApiError(
                f"'{model}' is no ensemble of adapters. {_FORM}", param="model", code="invalid_value"
            )
        parts.append((name, number))
    if len(parts) > MOST_PARTS:
        raise ApiError(f"An ensemble has at most {MOST_PARTS} adapters.", param="model", code="invalid_value")
    return parts


def ensemble_name(parts: Sequence[tuple[str, float]]) -> str:
    """The name of an ensemble of versions, as answers carry it."""
    return "+".join(f"{ref}:{weight:g}" for ref, weight in parts)
