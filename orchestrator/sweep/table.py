"""A sweep's trials as a table: sorted, with the keys that differ, the metric, steps and time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from orchestrator.spec.sweep import SweepSpec
from orchestrator.spec.trials import shown

from .trials import FAILED, Trial, ranked


def columns(sweep: SweepSpec, trials: Sequence[Trial]) -> list[str]:
    """The table's columns: the keys whose values differ over the trials in the middle."""
    return ["trial", "state", *differing(trials), sweep.metric, "steps", "seconds"]


def rows(sweep: SweepSpec, trials: Sequence[Trial]) -> list[list[str]]:
    """One row a trial, the best first."""
    keys = differing(trials)
    return [
        [
            str(trial.number),
            trial.state,
            *(_cell(trial.parameters.get(key)) for key in keys),
            _number(trial.value(sweep.metric)),
            str(trial.steps),
            f"{trial.seconds:.1f}",
        ]
        for trial in ranked(list(trials), sweep)
    ]


def failures(trials: Sequence[Trial]) -> list[str]:
    """One line for each trial that failed: why."""
    failed = sorted((each for each in trials if each.state == FAILED), key=lambda each: each.number)
    return [f"trial {each.number} failed: {each.cause}" for each in failed]


def differing(trials: Sequence[Trial]) -> list[str]:
    """The keys of which trials have different values, in the order of the space; all where there is one trial."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.parameters))
    if len(trials) < 2:
        return keys
    return [key for key in keys if len({repr(trial.parameters.get(key)) for trial in trials}) > 1]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return shown(value)
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
