"""Durations as people write them: `90`, `90s`, `10m`, `2h`, `1h30m`, `1d`."""

from __future__ import annotations

import re

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PART = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def parse_duration(value: object) -> float:
    """Seconds. A bare number is seconds. Raises ValueError with the forms that are allowed."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    text = str(value).strip().lower()
    if _PART.sub("", text) == "" and (parts := _PART.findall(text)):
        return sum(float(number) * _SECONDS[unit] for number, unit in parts)
    raise ValueError(f"'{value}' is not a duration. Write seconds, or 90s, 10m, 2h, 1h30m, 1d.")
