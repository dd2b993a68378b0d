"""Which trials go on: Tune's schedulers, which count by evaluations."""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.spec.sweep import SweepSpec

from .search import EVALUATIONS, VALUE

RECALLED = "recalled"
"""In a report: an earlier driver of the sweep had it, and decided by it."""

_ENDLESS = 10**6
"""More evaluations than any trial has: where a trial ends, its job says."""


class _Recalling:
    """Learns from what an earlier driver had, and decides nothing by it: told in another order, trials that went on
    then would be stopped now. Pauses nothing: a trial that waits would lose its place, and others have theirs."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """What becomes of a trial after a report."""
        decision: str = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        if result.get(RECALLED) or decision == TrialScheduler.PAUSE:
            return TrialScheduler.CONTINUE
        return decision


class _Asha(_Recalling, AsyncHyperBandScheduler):
    pass


class _Median(_Recalling, MedianStoppingRule):
    pass


def scheduler(sweep: SweepSpec) -> TrialScheduler:
    """The scheduler that a sweep asks for."""
    how = sweep.scheduler
    if how.type == "asha":
        return _Asha(
            time_attr=EVALUATIONS,
            metric=VALUE,
            mode=sweep.direction,
            max_t=_ENDLESS,
            grace_period=how.grace_period,
            reduction_factor=how.reduction_factor,
        )
    if how.type == "median":
        return _Median(
            time_attr=EVALUATIONS, metric=VALUE, mode=sweep.direction, grace_period=how.grace_period
        )
    return FIFOScheduler()
