"""Under a user's own DeepSpeed engine each rank names adapters of its own, row by row, disjoint on purpose.

Such an engine reduces each tensor's gradient when it comes, so that every rank must have the same tensors, in one
order. Losses and values are those of one process; what no row names stays as it is, and what its optimizer knows of
it too: a momentum is there, and weights decay.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from peft_dist import Rows, get_peft_model, get_peft_model_state_dict, sharding, tuner
from peft_dist.idle import Idle
from peft_dist.model import PeftModel
from tests.distributed import one_process as run
from tests.distributed.own_engine import own_engine
from tests.ranks import RankFailed, run_on_ranks

ROWS, RATE = 6, 0.05
BASE = "__base__"
# What the rows of each step name, rank 0's half first; None: the active one, on all ranks.
STEPS: list[Sequence[str] | None] = [
    ["1st", "2nd", BASE, "3rd", "4th", "4th"],
    None,
    [BASE, BASE, BASE, "2nd", "2nd", BASE],
    ["4th", "4th", "4th", "1st", "1st", "1st"],
]
METHODS = [method for method in run.METHODS if method != "ADAPTION_PROMPT"]
# Four in a model, and the one that stands beside no other method.
GROUPS = [*(METHODS[i : i + 4] for i in range(0, len(METHODS), 4)), ["ADAPTION_PROMPT"] * 4]


def model_of(methods: Sequence[str]) -> PeftModel:
    base, names = run.base().float(), ["1st", "2nd", "3rd", "4th"]
    # A group that is short begins again.
    configs = {name: run.METHODS[methods[i % len(methods)]]() for i, name in enumerate(names)}
    torch.manual_seed(run.SEED)
    model = get_peft_model(base, configs["1st"], "1st")
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    model.add_adapter("idle", run.METHODS[methods[0]]())
    model.set_requires_grad([*names, "idle"], True)
    run.disturb(model)
    return model.train()


def loss_of(called: Any, model: PeftModel, step: int) -> Tensor:
    """This rank's share of a global batch's loss."""
    ids, labels, indices = run.batch(step, 0)
    said = STEPS[step]
    names = None if said is None else [said[int(i) % ROWS] for i in indices]
    with model.using(Rows(adapters=names, samples=indices, seed=run.SEED, step=step)):
        more = run.read(model, indices)
        logits = called(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
    return run.token_loss_sum(logits, labels) / run.num_target_tokens(step, 1)


def states(model: PeftModel) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name in model.peft_config
        for key, value in get_peft_model_state_dict(model, adapter_name=name).items()
    }


def trained(methods: Sequence[str], stage: int) -> dict[str, Any]:
    with mock.patch.object(run, "PER_MICRO_BATCH", ROWS):
        model = model_of(methods)
        before = states(model)
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=RATE, momentum=0.9, weight_decay=0.1
        )
        engine = None
        if dist.is_initialized():
            zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
            engine = own_engine(model, optimizer, zero, ROWS // dist.get_world_size())
        losses = []
        for step in range(len(STEPS)):
            loss = loss_of(engine or model, model, step)
            if engine is None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            else:
                # An engine takes the mean over the ranks.
                engine.backward(loss * dist.get_world_size())
                engine.step()
            losses.append(run.over_all_ranks(loss.detach().double()))
        return {"losses": losses, "before": before, "after": states(model)}


def groups(chosen: Sequence[Sequence[str]], stage: int) -> list[dict[str, Any]]:
    sharding.disable_deepspeed_op_builds()
    return [trained(methods, stage) for methods in chosen]


@functools.cache
def alone(number: int) -> dict[str, Any]:
    return groups([GROUPS[number]], 0)[0]


def check(chosen: Sequence[int], stage: int) -> None:
    run.experts()
    ranks = run_on_ranks(groups, 2, [GROUPS[number] for number in chosen], stage, timeout_s=240.0)
    for rank in ranks:
        for number, ours in zip(chosen, rank, strict=True):
            one = alone(number)
            # fp32: sums of a few hundred terms in another order, over four steps.
            assert ours["losses"] == pytest.approx(one["losses"], abs=5e-6), GROUPS[number]
            for key, value in one["after"].items():
                torch.testing.assert_close(ours["after"][key], value, rtol=0, atol=1e-6, msg=key)
                if key.startswith("idle/"):
                    assert torch.equal(ours["after"][key], ours["before"][key]), key


@pytest.mark.parametrize(("stage", "chosen"), [(1, [0]), (2, [0, 1, 4]), (3, [0, 1, 3, 8])])
def test_ranks_that_name_adapters_of_their_own_equal_one_process(stage: int, chosen: list[int]) -> None:
    check(chosen, stage)


# A minute.
@pytest.mark.matrix
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_method_at_every_stage(stage: int) -> None:
    check([*range(len(GROUPS))], stage)


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_that_come_by_themselves_are_reduced_with_others(stage: int) -> None:
    with mock.patch.object(tuner, "joined", mock.Mock(return_value=None)), pytest.raises(RankFailed):
        run_on_ranks(groups, 2, GROUPS[:1], stage, timeout_s=20.0)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_engine_steps_over_what_nobody_used(stage: int) -> None:
    with mock.patch.object(Idle, "watch", mock.Mock()):
        for rank in run_on_ranks(groups, 2, GROUPS[:1], stage, timeout_s=60.0):
            idle = [key for key in rank[0]["before"] if key.startswith("idle/")]
            assert not all(torch.equal(rank[0]["after"][key], rank[0]["before"][key]) for key in idle)
            assert rank[0]["losses"] != pytest.approx(alone(0)["losses"], abs=5e-6)
