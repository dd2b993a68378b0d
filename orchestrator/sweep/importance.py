"""How much each parameter of a sweep matters, by Optuna's fANOVA over its trials."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import optuna
from optuna.distributions import (
    BaseDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from orchestrator.spec.space import Dimension, dimensions
from orchestrator.spec.sweep import SweepSpec

from .trials import Trial

FEWEST = 4
"""Trials with a value below which nothing can be said."""


def importances(sweep: SweepSpec, trials: Sequence[Trial]) -> dict[str, float]:
    """Dimension -> its share of the metric's variance, the largest first; empty where too few trials have a
    value, or all the same."""
    space = dimensions(sweep.space)
    known = [
        each
        for each in trials
        if math.isfinite(each.value(sweep.metric)) and all(name.name in each.drawn for name in space)
    ]
    if len(known) < FEWEST or len({each.value(sweep.metric) for each in known}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(direction="minimize" if sweep.direction == "min" else "maximize")
        described = {each.name: _distribution(each) for each in space}
        for trial in known:
            study.add_trial(
                optuna.trial.create_trial(
                    params={each.name: trial.drawn[each.name] for each in space},
                    distributions=described,
                    value=trial.value(sweep.metric),
                )
            )
        try:
            found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
        except (RuntimeError, ValueError):  # a dimension of one value, or trees without a split
            return {}
    return {name: float(value) for name, value in found.items()}


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.is_list:
        # by position: of unordered values fANOVA would look at every subset
        return IntDistribution(0, len(dimension.values) - 1)
    low, high = dimension.values[:2]
    if dimension.kind == "randint":
        return IntDistribution(int(low), int(high) - 1)
    return FloatDistribution(float(low), float(high), log=dimension.kind == "loguniform")
