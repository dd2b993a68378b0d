"""Which trials there are: Tune's own draws and Optuna's, those of earlier drivers of the sweep before new ones."""

from __future__ import annotations

import itertools
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.variant_generator import generate_variants

from orchestrator.spec.space import Dimension, Parameters, dimensions, merged, whole
from orchestrator.spec.sweep import SweepSpec
from orchestrator.spec.trials import count_trials

from .proxy import TRIAL

VALUE = "value"
"""The sweep's metric, in what Tune is told."""
EVALUATIONS = "evaluations"
"""Evaluations of a trial until now, by which schedulers count."""

_MISSES = 1000
"""Draws in a row that were there before, after which the rest of a finite space is gone through in order."""
_ASKS = 20
"""How often Optuna is asked again where it says what was there before, until one is drawn."""

Drawn = dict[str, Any]
"""Dimension -> what was drawn: a number, or the place in a list."""


@dataclass(frozen=True)
class Suggestion:
    """A trial that an earlier driver of this sweep had."""

    number: int
    drawn: Drawn


class Suggestions(Searcher):
    """What Tune asks for trials. It says `{"trial": number, DIMENSION: drawn, ...}`.

    Args:
        recalled: trials of earlier drivers: suggested again, in their order, before any new one. Their proxies tell
            what is known of them, so that scheduler and searcher know what they knew.
        seed: of all draws.
    """

    def __init__(self, sweep: SweepSpec, recalled: Sequence[Suggestion], seed: int) -> None:
        super().__init__(metric=VALUE, mode=sweep.direction)
        self._space = dimensions(sweep.space)
        self._left = count_trials(sweep)
        self._recalled = list(recalled)
        self._next = max((each.number for each in recalled), default=-1) + 1
        self._old: dict[str, Drawn] = {}
        """Trials that the searcher did not choose, by Tune's names."""
        self._inner: OptunaSearch | None = None
        self._chosen: dict[str, str] = {}
        """Those that it chose -> its own names of them."""
        self._seen = {_key(self._space, each.drawn) for each in recalled}
        self._points = points(sweep, seed, self._seen)
        if sweep.searcher == "optuna":
            self._inner = _optuna(self._space, sweep, seed + len(recalled))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial, or that there are no more."""
        if self._left <= 0:
            return Searcher.FINISHED
        if self._recalled:
            old = self._recalled.pop(0)
            self._left -= 1
            self._old[trial_id] = old.drawn
            return {TRIAL: old.number, **old.drawn}
        drawn = self._choice(trial_id) if self._inner else next(self._points, Searcher.FINISHED)
        if drawn is None or drawn == Searcher.FINISHED:
            return drawn
        self._left -= 1
        self._next += 1
        return {TRIAL: self._next - 1, **drawn}

    def _choice(self, trial_id: str) -> Any:
        """What Optuna says next, or another where it repeats itself."""
        assert self._inner is not None
        for number in range(_ASKS):
            name = f"{trial_id}.{number}"
            drawn = self._inner.suggest(name)
            if not isinstance(drawn, dict):
                return drawn
            if (key := _key(self._space, drawn)) not in self._seen:
                self._seen.add(key)
                self._chosen[trial_id] = name
                return drawn
            self._inner.on_trial_complete(name, error=True)  # as if it had not been asked
        drawn = next(self._points, Searcher.FINISHED)
        if isinstance(drawn, dict):
            self._old[trial_id] = drawn
        return drawn

    def stop(self) -> None:
        """No trial is suggested any more."""
        self._left = 0

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Passes on how a trial does."""
        if self._inner and trial_id in self._chosen:
            self._inner.on_trial_result(self._chosen[trial_id], result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Passes on what a trial came to; of one that an earlier driver began too."""
        if self._inner is None:
            return
        has_value = result is not None and result.get(VALUE, float("nan")) == result.get(VALUE)
        if name := self._chosen.get(trial_id):
            self._inner.on_trial_complete(name, result if has_value else None, error or not has_value)
        elif has_value and result is not None:
            self._inner.add_evaluated_point(self._old[trial_id], result[VALUE])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is known of trials is in the run's folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""


def parameters_of(space: Sequence[Dimension], drawn: Drawn) -> Parameters:
    """The keys that a trial sets, as plain values."""
    return merged(space, [_value(each, drawn[each.name]) for each in space])


def points(sweep: SweepSpec, seed: int, seen: set[str]) -> Iterator[Drawn]:
    """All trials of a grid, or drawn ones, each once, by Tune's variant generator; none that was seen, which they then
    are."""
    space = dimensions(sweep.space)

    def is_new(drawn: Drawn) -> bool:
        key = _key(space, drawn)
        is_known = key in seen
        seen.add(key)
        return not is_known

    everything = {each.name: _domain(each, whole_list=sweep.searcher == "grid") for each in space}
    dice = np.random.RandomState(seed % 2**32)
    if sweep.searcher == "grid":
        yield from (config for _, config in generate_variants(everything) if is_new(config))
        return
    misses = 0
    while misses < _MISSES:
        for _, config in generate_variants(everything, random_state=dice):
            misses += 1
            if is_new(config):
                misses = 0
                yield config
    names = [each.name for each in space]
    for values in itertools.product(*map(_all_of, space)):
        if is_new(config := dict(zip(names, values, strict=True))):
            yield config


def _all_of(dimension: Dimension) -> Iterator[Any]:
    """Everything that may be drawn of a dimension that has an end."""
    count = dimension.count or 0
    if dimension.is_list:
        return iter(range(count))
    low, step = dimension.values[0], dimension.values[2] if dimension.kind == "quniform" else 1
    return (low + step * number for number in range(count))


def _value(dimension: Dimension, drawn: Any) -> Any:
    if dimension.is_list:
        return dimension.values[drawn]
    if dimension.kind == "randint":
        return int(drawn)
    return whole(round(float(drawn), 12)) if dimension.kind == "quniform" else float(drawn)


def _domain(dimension: Dimension, *, whole_list: bool = False) -> Any:
    """Tune's form of a dimension; of a list its places, whatever stands there."""
    if dimension.is_list:
        places = list(range(len(dimension.values)))
        return tune.grid_search(places) if whole_list or dimension.kind == "grid" else tune.choice(places)
    return getattr(tune, dimension.kind)(*dimension.values)


def _optuna(space: Sequence[Dimension], sweep: SweepSpec, seed: int) -> OptunaSearch:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune.search.optuna").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # several trials are under way when the next is asked for: those count as not good
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)
        return OptunaSearch(
            {each.name: _domain(each) for each in space}, metric=VALUE, mode=sweep.direction, sampler=sampler
        )


def _key(space: Sequence[Dimension], drawn: Drawn) -> str:
    """The same for the same trial."""
    return json.dumps(parameters_of(space, drawn), sort_keys=True, default=str)
