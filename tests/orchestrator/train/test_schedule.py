import math

import pytest
import torch
from transformers import get_scheduler

from orchestrator.spec.job import TrainingSpec
from orchestrator.train.worker.schedule import evaluates_at, is_due, learning_rate, num_warmup_steps, saves_at


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("total", "ratio"), [(1, 0.0), (20, 0.0), (20, 0.03), (17, 0.25), (8, 1.0)])
def test_rates_are_those_of_transformers(kind, total, ratio):
    training = TrainingSpec(learning_rate=3e-3, lr_scheduler=kind, warmup_ratio=ratio)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps(total, ratio), total)
    for step in range(1, total + 1):
        # two spellings of one formula in double precision
        assert math.isclose(learning_rate(step, total, training), theirs.get_last_lr()[0], rel_tol=1e-12)
        optimizer.step()
        theirs.step()


def test_warm_up_rises_from_zero_to_the_peak():
    training = TrainingSpec(learning_rate=1.0, lr_scheduler="constant", warmup_ratio=0.5)
    assert [learning_rate(step, 8, training) for step in range(1, 9)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]


def test_every_so_many_steps():
    assert [step for step in range(1, 13) if is_due(step, 5, 4, None)] == [4, 8, 12]


def test_so_many_times_an_epoch():
    assert [step for step in range(1, 15) if is_due(step, 7, None, None)] == [7, 14]
    assert [step for step in range(1, 15) if is_due(step, 7, None, 2)] == [4, 7, 11, 14]
    assert [step for step in range(1, 7) if is_due(step, 3, None, 10)] == [1, 2, 3, 4, 5, 6]


def test_cadences_come_from_their_own_keys():
    training = TrainingSpec(save_steps=3, evals_per_epoch=2)
    assert [step for step in range(1, 9) if saves_at(step, 4, training)] == [3, 6]
    assert [step for step in range(1, 9) if evaluates_at(step, 4, training)] == [2, 4, 6, 8]
