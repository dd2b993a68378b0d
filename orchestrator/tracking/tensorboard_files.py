"""TensorBoard: event files, one folder a run; a run that goes on hides the steps that it repeats."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from .sink import Sink


class TensorboardFiles(Sink):
    """Event files below a folder.

    Args:
        folder: of all runs; each has one below it by its name, a nested one below its parent's.
    """

    def __init__(self, folder: str) -> None:
        self._root = Path(folder)
        self._folders: dict[str, Path] = {}
        self._writers: dict[str, SummaryWriter] = {}
        self._texts: dict[str, list[tuple[str, str]]] = {}

    def start(self, message: dict[str, Any]) -> None:
        above = self._folders.get(message["parent"], self._root) if message["parent"] else self._root
        self._folders[message["key"]] = above / message["name"]
        params = json.dumps(message["params"], indent=1, default=str)
        self._texts.setdefault(message["key"], []).append(("parameters", f"```\n{params}\n```"))

    def metrics(self, key: str, batch: Sequence[dict[str, Any]]) -> None:
        writer = self._writer(key, batch[0]["step"])
        for each in batch:
            for name, value in each["values"].items():
                if value is not None and not math.isnan(value):
                    writer.add_scalar(name, value, each["step"], walltime=each["t"])
        writer.flush()

    def tags(self, key: str, message: dict[str, Any]) -> None:
        lines = "\n".join(f"- {name}: {value}" for name, value in message["tags"].items())
        self._texts.setdefault(key, []).append(("lineage", lines))

    def text(self, key: str, message: dict[str, Any]) -> None:
        name = message["file"].replace(".", "_")
        self._texts.setdefault(key, []).append((name, f"```\n{message['content']}\n```"))

    def end(self, key: str, message: dict[str, Any]) -> None:
        writer = self._writer(key, 0)
        for name, text in self._texts.pop(key, []):
            writer.add_text(name, text)
        writer.add_text("status", message["status"])
        writer.close()
        self._writers.pop(key, None)

    def close(self) -> None:
        for key in list(self._writers):
            self.end(key, {"status": "killed"})

    def _writer(self, key: str, step: int) -> SummaryWriter:
        """Steps from this one on that earlier files of the folder hold are not shown any more."""
        if key not in self._writers:
            folder = self._folders.get(key, self._root / key)
            self._writers[key] = SummaryWriter(
                str(folder), purge_step=step if folder.exists() and step else None
            )
        return self._writers[key]
