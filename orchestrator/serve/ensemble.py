"""Several adapters named in one request: `a:0.7+b@2:0.3`, each with its weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .api_error import ApiError

MOST_PARTS = 16
_FORM = "Write NAME:WEIGHT+NAME:WEIGHT, such as docs:0.7+legal@2:0.3; a part without a weight has 1."


def parse_ensemble(model: str) -> list[tuple[str, float]] | None:
    """The parts of an ensemble, as they stand; None where `model` is one adapter's or the base's name.

    Raises:
        ApiError: a part without a name, a weight that is no finite number, too many parts.
    """
    if "+" not in model and ":" not in model:
        return None
    parts = []
    for text in model.replace("e+", "e").split("+"):
        name, colon, weight = text.strip().partition(":")
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
