"""The metrics of all replicas of an endpoint under one URL: a proxy asks one of them, which adds what the others have
written in the registry's storage.

ROOT/serving/ENDPOINT/metrics/REPLICA.json      written every few seconds while there are several replicas
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable

from orchestrator import objects, stored
from orchestrator.errors import StorageError
from orchestrator.objects import NotFound, join

from ..shared_folder import SharedFolder

_log = logging.getLogger("ray.serve")

EVERY_S = 5.0
_SILENT_S = 30.0
"""A replica that has written nothing for so long is gone, as are its series."""
_FORGOTTEN_S = 3600.0


class MetricFiles:
    """Where the replicas of one endpoint write down their metrics."""

    def __init__(self, registry_url: str, endpoint: str, replica: str) -> None:
        self._shared = SharedFolder(registry_url, endpoint)
        self._folder = join(self._shared.url, "metrics")
        self._own = f"{re.sub(r'[^A-Za-z0-9._-]', '-', replica)}.json"

    def write(self, text: str) -> None:
        """Replaces what this replica has written; raises as `SharedFolder.write`."""
        self._shared.write(stored.dump({"at": time.time(), "text": text}), "metrics", self._own)

    def others(self) -> list[str]:
        """What the other replicas wrote lately; what is long forgotten is deleted."""
        found, now = [], time.time()
        for name in objects.list_(self._folder):
            url = join(self._folder, name)
            try:
                document = stored.load(objects.read(url)[0], url)
            except (NotFound, StorageError):
                continue
            age = now - document.get("at", 0.0)
            if name != self._own and age < _SILENT_S:
                found.append(str(document.get("text", "")))
            elif age > _FORGOTTEN_S:
                objects.delete(url)
        return found

    def remove(self) -> None:
        """Takes away what this replica has written: it leaves."""
        objects.delete(join(self._folder, self._own))


def merged(texts: Iterable[str]) -> str:
    """Several texts as one: Prometheus wants the lines of each metric together."""
    heads: dict[str, list[str]] = {}
    lines: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines():
            if line.startswith("# "):
                name = line.split(" ", 3)[2]
                if line not in heads.setdefault(name, []):
                    heads[name].append(line)
            elif line:
                lines.setdefault(name, []).append(line)
    whole = (line for name, head in heads.items() for line in [*head, *lines.get(name, ())])
    return "\n".join(whole) + "\n"
