"""By what a request is told apart from others, so that it is answered by one version again and again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sticky:
    """One request's headers and body. A request without the key that a rollout names is told by its whole body: the
    same request gets the same version."""

    headers: Mapping[str, str] = field(default_factory=dict)
    """By lower-case names, as Starlette gives them."""
    body: bytes = b""

    def value(self, key: str) -> str:
        """What stands at `key`: a field of the body (`user`, `metadata.customer`), else a header; else the body."""
        found = _field(self.body, key)
        if found is None:
            found = self.headers.get(key.lower())
        return self.body.decode(errors="replace") if found is None else found


def _field(body: bytes, key: str) -> str | None:
    try:
        found = json.loads(body)
    except ValueError:
        return None
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return None
        found = found[part]
    if found is None:  # as some clients write what is not given; it tells nobody from anybody
        return None
    return found if isinstance(found, str) else json.dumps(found, sort_keys=True)
