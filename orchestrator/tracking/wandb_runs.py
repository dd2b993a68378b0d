"""Weights & Biases: online, or offline into files that `wandb sync` uploads later."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb

from .sink import Sink

_LONGEST_ID = 64


class WandbRuns(Sink):
    """Runs of one project.

    Args:
        project, entity: as W&B names them. mode: online or offline. folder: where its files are.
    """

    def __init__(self, project: str, entity: str | None, mode: str, folder: str) -> None:
        self._project, self._entity, self._mode, self._folder = project, entity, mode, folder
        self._runs: dict[str, Any] = {}
        self._last_step: dict[str, int] = {}
        Path(folder).mkdir(parents=True, exist_ok=True)

    def start(self, message: dict[str, Any]) -> None:
        key = message["key"]
        if key in self._runs:
            return
        run = wandb.init(
            project=self._project,
            entity=self._entity,
            name=message["name"],
            id=_id(key),
            group=message["parent"],
            config={**message["params"], "raypeft": message["tags"]},
            resume="allow",
            mode=self._mode,  # type: ignore[arg-type]
            dir=self._folder,
            reinit="create_new",
        )
        # a step that is repeated is no error there: our own number is the axis
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._last_step[key] = int(run.summary.get("step") or -1) if run.resumed else -1
        self._runs[key] = run

    def metrics(self, key: str, batch: Sequence[dict[str, Any]]) -> None:
        for each in batch:
            if each["step"] > self._last_step[key] or "loss" not in each["values"]:
                self._runs[key].log({**each["values"], "step": each["step"]})

    def tags(self, key: str, message: dict[str, Any]) -> None:
        self._runs[key].summary.update(message["tags"])

    def text(self, key: str, message: dict[str, Any]) -> None:
        folder = Path(self._runs[key].dir)
        (folder / message["file"]).write_text(message["content"])
        self._runs[key].save(str(folder / message["file"]), base_path=str(folder), policy="now")

    def end(self, key: str, message: dict[str, Any]) -> None:
        run = self._runs.pop(key, None)
        if run is not None:
            run.finish(exit_code=0 if message["status"] == "finished" else 1)

    def close(self) -> None:
        for key in list(self._runs):
            self.end(key, {"status": "killed"})


def _id(key: str) -> str:
    """W&B's name of a run: at most 64 letters, digits and dashes. Of trials the beginnings are alike."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", key)
    if len(plain) <= _LONGEST_ID:
        return plain
    mark = hashlib.sha256(key.encode()).hexdigest()[:16]
    return f"{plain[: _LONGEST_ID - len(mark) - 1]}-{mark}"
