"""The dated result of a run of the matrix: under benchmarks/results; docs/methods.md has its table from it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.matrix.axes import CHECKS, METHODS, NOT_MERGED, STAGES, STORAGES

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
_PACKAGES = ("torch", "deepspeed", "bitsandbytes", "transformers")

# Method -> check -> "yes", "refused", or what was wrong.
Judged = dict[str, dict[str, str]]


@dataclass
class Result:
    """What came of the cells that were run: storage -> stage -> method -> check -> what came of it.

    Attributes:
        seconds: what each pair of processes took, by storage and stage.
    """

    date: str
    hardware: str
    versions: dict[str, str]
    cells: dict[str, dict[str, Judged]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return RESULTS / f"{self.date}-{self.hardware}-matrix.json"

    def add(self, stage: str, storage: str, judged: Judged, seconds: float) -> None:
        """Takes what came of one stage and storage, and keeps all that there is by now."""
        self.cells.setdefault(storage, {})[stage] = judged
        self.seconds.setdefault(storage, {})[stage] = round(seconds, 1)
        self._write()

    def came(self, method: str, stage: str, storage: str) -> dict[str, str]:
        """Check -> what came of it in one cell; empty where it was not run."""
        return self.cells.get(storage, {}).get(stage, {}).get(method, {})

    def _write(self) -> None:
        head = {
            "date": self.date,
            "hardware": self.hardware,
            "versions": self.versions,
            "seconds": self.seconds,
        }
        lines = [f' "{key}": {json.dumps(value)},' for key, value in head.items()]
        groups = []
        for storage in sorted(self.cells, key=STORAGES.index):
            stages = []
            for stage in sorted(self.cells[storage], key=[*STAGES].index):
                cells = self.cells[storage][stage]
                rows = ",\n".join(f'    "{method}": {json.dumps(cells[method])}' for method in cells)
                stages.append(f'   "{stage}": {{\n{rows}\n   }}')
            groups.append(f'  "{storage}": {{\n' + ",\n".join(stages) + "\n  }")
        text = "\n".join(["{", *lines, ' "cells": {', ",\n".join(groups), " }", "}"]) + "\n"
        aside = self.path.with_suffix(".part")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, self.path)


def begun() -> Result:
    """An empty result of today and this machine."""
    hardware = f"{os.cpu_count()}cpu-{platform.machine()}"
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return Result(datetime.date.today().isoformat(), hardware, versions)


def read(path: Path) -> Result:
    """A result that was kept."""
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Result(**stored)


def latest() -> Result:
    """The newest result that is kept.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = sorted(RESULTS.glob("*-matrix.json"))
    if not paths:
        raise FileNotFoundError(f"{RESULTS} holds no result of the matrix. Run: make matrix")
    return read(paths[-1])


def short(came: dict[str, str], method: str) -> str:
    """A cell of the table: `yes`; `yes, unmerged` where merging is rightly refused; what failed; or `untested`."""
    if came.keys() != CHECKS.keys():
        return "untested"
    wrong = [check for check, what in came.items() if what not in ("yes", "refused")]
    if wrong:
        return f"not: {', '.join(wrong)}"
    return "yes, unmerged" if method in NOT_MERGED else "yes"


def wrong_cells(result: Result) -> list[str]:
    """Every cell that is not as it should be, with what was wrong or that it was not run."""
    return [
        f"{method}, {stage}, {storage}: {came or 'untested'}"
        for storage in STORAGES
        for stage in STAGES
        for method in METHODS
        if not short(came := result.came(method, stage, storage), method).startswith("yes")
    ]


def table(result: Result) -> list[str]:
    """The lines of the section of docs/methods.md."""
    columns = [f"{stage}, {storage}" for stage in STAGES for storage in STORAGES]
    rows = [
        f"| {method} | "
        + " | ".join(
            short(result.came(method, stage, storage), method) for stage in STAGES for storage in STORAGES
        )
        + " |"
        for method in METHODS
    ]
    return [
        "## Sharded and quantised",
        "",
        f"What `make matrix` found on {result.date} ({result.hardware}, "
        + ", ".join(f"{name} {version}" for name, version in result.versions.items())
        + "): two ranks beside one process on the same global batches. nf4 is doubly quantised, stored as uint8 or "
        "as fp32. A cell says yes where each of these holds:",
        "",
        *(f"- {check}: {what}." for check, what in CHECKS.items()),
        "",
        "Of an unmerged one merging is refused: there is no weight that it could be merged into.",
        "",
        "| method | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *rows,
    ]
