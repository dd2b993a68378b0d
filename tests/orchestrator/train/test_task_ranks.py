"""Each task on several gloo ranks: what is trained and measured does not depend on their number, nor on how a batch is
cut; a run that stopped goes on to the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.train.worker.run import train
from tests.ranks import run_on_ranks

from .ends import difference
from .tasks import KINDS, task_job
from .test_run import Recorder
from .tiny import plan, request


def on_rank(folder: Path, spec, made_plan, run: str, stop_after: int | None = None):
    torch.set_num_threads(1)
    return train(request(folder, spec, made_plan, run=run), reporter=Recorder(stop_after))


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_what_one_does(kind, tmp_path):
    # 12 rows in global batches of 8: the second one is short, and leaves a rank with one micro-batch less
    training = {"num_epochs": 2, "learning_rate": 0.1, "optimizer": "sgd", "max_grad_norm": 0}
    spec = task_job(tmp_path, kind, adapter={"lora_dropout": 0.2}, training=training)
    (alone,) = run_on_ranks(on_rank, 1, tmp_path, spec, plan(micro=8), "alone")
    both = run_on_ranks(on_rank, 2, tmp_path, spec, plan(workers=2, accumulation=2), "both")
    assert both[0] == both[1] and both[0].steps == alone.steps == 4
    # four plain steps in fp32, so that only the order of sums differs; rows are padded in other groups. A cosine's
    # rounding is multiplied with 20, the inverse of the temperature.
    near = 1e-4 if kind == "embedding" else 1e-5
    assert difference(alone, both[0]) < near
    assert both[0].metrics["eval_loss"] == pytest.approx(alone.metrics["eval_loss"], rel=near)
    assert both[0].metrics["train_loss"] == pytest.approx(alone.metrics["train_loss"], rel=near)


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_does_not_depend_on_the_number_of_ranks(kind, tmp_path):
    spec = task_job(tmp_path, kind, training={"max_steps": 1, "learning_rate": 1e-9})
    (alone,) = run_on_ranks(on_rank, 1, tmp_path, spec, plan(micro=2), "alone")
    three = run_on_ranks(on_rank, 3, tmp_path, spec, plan(workers=3, stage=2), "three")
    base = {name: value for name, value in alone.metrics.items() if name.startswith("base.")}
    assert len(base) >= 3
    assert base == {name: value for name, value in three[2].metrics.items() if name.startswith("base.")}


@pytest.mark.parametrize("kind", ["classification", "embedding"])
def test_a_sharded_base_trains_the_same(kind, tmp_path):
    spec = task_job(tmp_path, kind, training={"max_steps": 2})
    (alone,) = run_on_ranks(on_rank, 1, tmp_path, spec, plan(micro=4), "alone")
    both = run_on_ranks(on_rank, 2, tmp_path, spec, plan(workers=2, stage=3), "both")
    # two steps of AdamW at 1e-2 in fp32
    assert difference(alone, both[0]) < 2e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_to_the_same(kind, tmp_path):
    spec = task_job(tmp_path, kind, training={"num_epochs": 2})
    whole = on_rank(tmp_path, spec, plan(micro=4), "whole")
    first = on_rank(tmp_path, spec, plan(micro=4), "parts", 2)
    assert first.is_stopped and first.steps == 2
    second = on_rank(tmp_path, spec, plan(micro=4), "parts")
    assert difference(whole, second) == 0.0
    assert second.metrics["eval_loss"] == whole.metrics["eval_loss"]


@pytest.mark.parametrize(
    ("kind", "fields"), [("adalora", {"init_r": 4, "target_r": 2}), ("osf", {}), ("vera", {"r": 8})]
)
def test_methods_that_act_as_a_whole_do_so_on_every_rank(kind, fields, tmp_path):
    """A budget over all layers, a projected gradient, tensors that layers share: the same whoever owns which."""
    training = {
        "max_steps": 4,
        "num_epochs": 4,
        "learning_rate": 0.02,
        "optimizer": "sgd",
        "max_grad_norm": 0,
    }
    spec = task_job(tmp_path, "classification", adapter={"type": kind, **fields}, training=training)
    (alone,) = run_on_ranks(on_rank, 1, tmp_path, spec, plan(micro=8), "alone")
    both = run_on_ranks(on_rank, 2, tmp_path, spec, plan(workers=2, accumulation=2, stage=2), "both")
    # four plain steps in fp32, so that only the order of sums differs
    assert difference(alone, both[0]) < 1e-5
