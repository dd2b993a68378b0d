"""Which trials go on: Tune's schedulers, which count by evaluations."""

from __future__ import annotations

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.spec.sweep import SweepSpec

from .search import EVALUATIONS, VALUE

_ENDLESS = 10**6
"""More evaluations than any trial has: where a trial ends, its job says."""


def scheduler(sweep: SweepSpec) -> TrialScheduler:
    """The scheduler that a sweep asks for."""
    how = sweep.scheduler
    if how.type == "asha":
        return AsyncHyperBandScheduler(
            time_attr=EVALUATIONS,
            metric=VALUE,
            mode=sweep.direction,
            max_t=_ENDLESS,
            grace_period=how.grace_period,
            reduction_factor=how.reduction_factor,
        )
    if how.type == "median":
        return MedianStoppingRule(
            time_attr=EVALUATIONS, metric=VALUE, mode=sweep.direction, grace_period=how.grace_period
        )
    return FIFOScheduler()
