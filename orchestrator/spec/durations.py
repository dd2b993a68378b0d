"""Durations as people write them: `90`, `90s`, `10m`, `2h`, `1h30m`, `1d`."""

from __future__ import annotations

import math
import re

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])\s*")
_FORMS = "Write seconds, or 90s, 10m, 2h, 1h30m, 1d."


def parse_duration(value: object) -> float:
    """Seconds. A bare number is seconds. Raises ValueError with the forms that are allowed."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value < 0 or not math.isfinite(value):
            raise ValueError(f"{value} is not a duration: it is below zero or endless. {_FORMS}")
        return float(value)
    text = str(value).strip().lower()
    if text and _PART.sub("", text) == "":
        return sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(text))
    raise ValueError(f"'{value}' is not a duration. {_FORMS}")


def format_duration(seconds: float) -> str:
    """The shortest form that `parse_duration` reads back as the same number: `10m`, `1h30m`, `2.5s`."""
    if seconds != int(seconds) or seconds == 0:
        return f"{seconds:g}s"
    rest, parts = int(seconds), []
    for unit in ("d", "h", "m", "s"):
        count, rest = divmod(rest, _SECONDS[unit])
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)
