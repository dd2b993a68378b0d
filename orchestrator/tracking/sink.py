"""What one tracker does with messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Sink:
    """A tracker. A message that failed is written again: each must be harmless twice."""

    def write(self, batch: Sequence[dict[str, Any]]) -> None:
        """One message (`op` start, tags, text or end), or several of `metrics` of one run, by step."""
        first = batch[0]
        if first["op"] == "metrics":
            self.metrics(first["key"], batch)
        elif first["op"] == "start":
            self.start(first)
        else:
            getattr(self, first["op"])(first["key"], first)

    def start(self, message: dict[str, Any]) -> None:
        """`key`, `name`, `parent`, `params`, `tags` of a run that begins or goes on."""
        raise NotImplementedError

    def metrics(self, key: str, batch: Sequence[dict[str, Any]]) -> None:
        """`step`, `t` (unix seconds) and `values` of each."""
        raise NotImplementedError

    def tags(self, key: str, message: dict[str, Any]) -> None:
        """`tags`: name -> text."""
        raise NotImplementedError

    def text(self, key: str, message: dict[str, Any]) -> None:
        """`file` and `content`."""
        raise NotImplementedError

    def end(self, key: str, message: dict[str, Any]) -> None:
        """`status`: finished, failed or killed."""
        raise NotImplementedError

    def close(self) -> None:
        """No more messages come; runs without an end are those of a driver that died."""
        raise NotImplementedError


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one, by dotted key; empty ones are left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flat(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
            found |= flat({str(number): each for number, each in enumerate(value)}, f"{name}.")
        else:
            found[name] = value
    return found
