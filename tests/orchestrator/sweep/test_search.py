"""Which trials are suggested: Tune's draws and Optuna's, those that were before first."""

import itertools

import pytest

from orchestrator.spec.space import dimensions
from orchestrator.spec.sweep import SweepSpec
from orchestrator.spec.trials import count_trials
from orchestrator.sweep.search import VALUE, Suggestion, Suggestions, parameters_of, points

SPACE = {
    "adapter.target_modules": {"choice": [["q_proj"], ["v_proj"]]},
    "adapter.r": {"randint": [2, 9]},
    "training.learning_rate": {"loguniform": [1e-5, 1e-3]},
    "training.warmup_ratio": {"quniform": [0, 0.2, 0.1]},
    "paired": [{"training.seed": 1, "adapter.alpha": 4}, {"training.seed": 2, "adapter.alpha": 8}],
}


def drawn(sweep, recalled=(), seed=3):
    """All that a sweep suggests; a trial's value is its number."""
    suggestions, found = Suggestions(sweep, recalled, seed), []
    for name in map(str, itertools.count()):
        if not isinstance(suggestion := suggestions.suggest(name), dict):
            return found
        found.append(suggestion)
        suggestions.on_trial_complete(name, {VALUE: float(name), "training_iteration": 1})


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_values_are_of_the_space_and_the_same_for_a_seed(searcher):
    sweep = SweepSpec(space=SPACE, num_trials=12, searcher=searcher)
    found = [parameters_of(dimensions(SPACE), each) for each in drawn(sweep)]
    assert [parameters_of(dimensions(SPACE), each) for each in drawn(sweep)] == found
    assert [parameters_of(dimensions(SPACE), each) for each in drawn(sweep, seed=4)] != found
    for each in found:
        assert each["adapter.target_modules"] in (["q_proj"], ["v_proj"])
        assert type(each["adapter.r"]) is int and 2 <= each["adapter.r"] < 9
        assert 1e-5 <= each["training.learning_rate"] <= 1e-3
        assert each["training.warmup_ratio"] in (0, 0.1, 0.2)
        assert (each["training.seed"], each["adapter.alpha"]) in ((1, 4), (2, 8))
    assert len({str(each) for each in found}) == 12


def test_a_grid_is_every_combination_once():
    space = {name: SPACE[name] for name in ("adapter.target_modules", "paired")}
    sweep = SweepSpec(space=space, searcher="grid")
    found = [parameters_of(dimensions(space), each) for each in points(sweep, 0, set())]
    assert len(found) == 4 == len({str(each) for each in found})


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_what_has_an_end_is_gone_through_and_nothing_is_drawn_twice(searcher):
    space = {
        "adapter.r": {"choice": [2, 4, 8]},
        "training.seed": {"randint": [1, 4]},
        "adapter.dropout": {"quniform": [0, 0.2, 0.1]},
    }
    sweep = SweepSpec(space=space, num_trials=100, searcher=searcher)
    found = [str(parameters_of(dimensions(space), each)) for each in drawn(sweep)]
    assert len(found) == 27 == len(set(found)) == count_trials(sweep)


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_trials_that_were_come_first_and_are_not_drawn_again(searcher):
    sweep = SweepSpec(space=SPACE, num_trials=6, searcher=searcher)
    before = drawn(sweep)[:4]
    recalled = [
        Suggestion(each["trial"], {k: v for k, v in each.items() if k != "trial"}) for each in before[::-1]
    ]
    found = drawn(sweep, recalled)
    assert found[:4] == before[::-1] and [each["trial"] for each in found[4:]] == [4, 5]
    assert not [each for each in found[4:] if {**each, "trial": 0} in [{**b, "trial": 0} for b in before]]
