"""Every method of the catalog under a user's own DeepSpeed engine, beside one process on the same global batches.

It trains to one process's losses, goes on from what is loaded into it, and AdaLoRA's budget falls alike, at
whichever place it is called. Adapters on meta over a base that `deepspeed.zero.Init` partitioned start when the
engine is built.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from peft_dist import (
    LoraConfig,
    Rows,
    get_peft_model,
    get_peft_model_state_dict,
    prompts,
    set_peft_model_state_dict,
    sharding,
    tuner,
)
from peft_dist.config import PeftConfig
from peft_dist.errors import ShardingError
from peft_dist.gradients import Gradients
from peft_dist.model import PeftModel
from tests.distributed import one_process as run
from tests.distributed.own_engine import config_of, own_engine
from tests.ranks import RankFailed, run_on_ranks

STEPS, RATE = 3, 0.05
# What a checkpoint holds of them are tokens, which cannot take the place of the network that an engine trains.
WITH_A_NETWORK = ("P_TUNING", "PREFIX_TUNING")


def model_of(method: str) -> PeftModel:
    base, config = run.base().float(), run.METHODS[method]()
    # Half of the methods find the base in eval mode: adapters train all the same.
    base.train(len(method) % 2 == 0)
    torch.manual_seed(run.SEED)
    model = get_peft_model(base, config)
    run.disturb(model)
    return model


def loss_of(model: Any, peft_model: PeftModel, step: int) -> Tensor:
    """The mean over this rank's share; shares have equally many targets, so their mean is the batch's."""
    ids, _, indices = run.batch(step, 0)
    with peft_model.using(Rows(samples=indices, seed=run.SEED, step=step)):
        more = run.read(peft_model, indices)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
    return run.token_loss_sum(logits, ids) / ids[:, 1:].numel()


def elsewhere(model: PeftModel) -> dict[str, Tensor]:
    """A checkpoint of the adapter with other values. CPT's must lie in its balls, so they are left as they are."""
    if model.peft_config["default"].peft_type == "CPT":
        return get_peft_model_state_dict(model)
    generator = torch.Generator().manual_seed(5)
    state = get_peft_model_state_dict(model)
    return {
        key: t + 0.05 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for key, t in state.items()
    }


def alone(method: str) -> dict[str, Any]:
    model = model_of(method)
    given = elsewhere(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "state": get_peft_model_state_dict(model), "given": given}


def in_engine(model: PeftModel, stage: int, optimizer: torch.optim.Optimizer) -> Any:
    return own_engine(model, optimizer, zero_at(stage), run.PER_MICRO_BATCH // 2)


def zero_at(stage: int) -> dict[str, Any]:
    return {"stage": stage, "stage3_param_persistence_threshold": 0}


def one_method(method: str, stage: int, given: dict[str, Tensor]) -> dict[str, Any]:
    model = model_of(method)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    engine = in_engine(model, stage, optimizer)
    losses = []
    for step in range(STEPS):
        loss = loss_of(engine, model, step)
        engine.backward(loss)
        engine.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(whole.item() / dist.get_world_size())
    report: dict[str, Any] = {"losses": losses, "state": get_peft_model_state_dict(model)}
    if method in WITH_A_NETWORK:
        with pytest.raises(ShardingError, match="tokens without the network that makes them"):
            set_peft_model_state_dict(model, given)
    else:
        set_peft_model_state_dict(model, given)
        for group in optimizer.param_groups:
            group["lr"] = 1e-6
        engine.backward(loss_of(engine, model, STEPS))
        engine.step()
        report["after"] = get_peft_model_state_dict(model)
    with pytest.raises(ShardingError, match="cannot be added"):
        model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    return report


def all_methods(stage: int, given: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Any]]:
    sharding.disable_deepspeed_op_builds()
    return {method: one_method(method, stage, values) for method, values in given.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    return {method: alone(method) for method in run.METHODS}


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert list(ours) == list(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in theirs)
    return max(
        (float((ours[k].float() - theirs[k].float()).abs().max()) for k in theirs if theirs[k].numel()),
        default=0.0,
    )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_method_trains_and_goes_on_from_what_is_loaded(stage: int, expected: dict) -> None:
    given = {method: one["given"] for method, one in expected.items()}
    for rank in run_on_ranks(all_methods, 2, stage, given, timeout_s=400.0):
        for method, one in expected.items():
            # fp32: sums of a few hundred terms in another order, over three steps.
            assert rank[method]["losses"] == pytest.approx(one["losses"], abs=2e-4), method
            assert furthest(rank[method]["state"], one["state"]) < 1e-4, method
            if "after" in rank[method]:
                # A step at 1e-6; X-LoRA's and the others' gradients are below ten.
                assert furthest(rank[method]["after"], one["given"]) < 2e-5, method


def projected_in_one_place(stage: int, given: dict[str, Tensor]) -> dict[str, Any]:
    """CPT where only the parameter itself is brought back, not what the engine keeps of it."""
    sharding.disable_deepspeed_op_builds()
    with mock.patch.object(prompts.model, "set_whole", lambda p, value: p.data.copy_(value)):
        return one_method("CPT", stage, given)


def test_what_is_brought_back_must_be_so_in_the_engine_too(expected: dict) -> None:
    one = expected["CPT"]
    for report in run_on_ranks(projected_in_one_place, 2, 2, one["given"]):
        assert furthest(report["state"], one["state"]) > 1e-3


# AdaLoRA's budget

PLACES = ("between", "after")


def budget_of(stage: int | None, place: str) -> dict[str, Any]:
    model = model_of("ADALORA")
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0
    )
    engine = None if stage is None else in_engine(model, stage, optimizer)
    for step in range(5):
        loss = loss_of(engine or model, model, step)
        if engine is None:
            optimizer.zero_grad()
            loss.backward()
        else:
            engine.backward(loss)
        if place == "between":
            model.base_model.update_and_allocate(step + 1)
        (engine or optimizer).step()
        if place == "after":
            model.base_model.update_and_allocate(step + 1)
    model.base_model.settle()
    kept = model.peft_config["default"].rank_pattern
    return {"kept": kept, "state": get_peft_model_state_dict(model), "logits": run.evaluate(model)}


def budgets(stage: int, watches: bool = True) -> dict[str, Any]:
    sharding.disable_deepspeed_op_builds()
    with mock.patch.object(Gradients, "watch", Gradients.watch if watches else mock.Mock()):
        return {place: budget_of(stage, place) for place in PLACES}


@pytest.fixture(scope="module")
def budgets_alone() -> dict[str, Any]:
    return {place: budget_of(None, place) for place in PLACES}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_adaloras_budget_falls_as_in_one_process(stage: int, budgets_alone: dict) -> None:
    for rank in run_on_ranks(budgets, 2, stage):
        for place, one in budgets_alone.items():
            assert one["kept"] and not all(map(all, one["kept"].values()))
            assert rank[place]["kept"] == one["kept"], place
            assert furthest(rank[place]["state"], one["state"]) < 1e-4, place
            torch.testing.assert_close(rank[place]["logits"], one["logits"], rtol=0, atol=2e-4)


def test_a_budget_needs_the_gradients_that_the_engine_takes(budgets_alone: dict) -> None:
    for rank in run_on_ranks(budgets, 2, 3, False):
        assert all(rank[place]["kept"] != one["kept"] for place, one in budgets_alone.items())


def with_its_own_term(stage: int | None, together: bool = True) -> list[float]:
    """The losses as a base counts them by its labels, to which AdaLoRA adds how far its factors are from orthogonal."""
    model = model_of("ADALORA")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    sharding.disable_deepspeed_op_builds()
    engine = None if stage is None else in_engine(model, stage, optimizer)
    losses = []
    with (
        contextlib.nullcontext()
        if together
        else mock.patch.object(tuner, "joined", mock.Mock(return_value=None))
    ):
        for step in range(STEPS):
            ids, _, indices = run.batch(step, 0)
            with model.using(Rows(samples=indices, seed=run.SEED, step=step)):
                loss = (engine or model)(input_ids=ids, labels=ids).loss
            if engine is None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            else:
                engine.backward(loss)
                engine.step()
            losses.append(run.over_all_ranks(loss.detach()) / run.rank_and_world()[1])
    return losses


@pytest.mark.parametrize("stage", [2, 3])
def test_what_adalora_adds_to_the_loss_is_one_process_s(stage: int) -> None:
    one = with_its_own_term(None)
    for rank in run_on_ranks(with_its_own_term, 2, stage):
        assert rank == pytest.approx(one, abs=1e-5)


def test_a_term_of_the_loss_needs_whole_factors() -> None:
    with pytest.raises(RankFailed, match=r"mT is only supported|0D or 1D|size mismatch|must match"):
        run_on_ranks(with_its_own_term, 2, 3, False, timeout_s=20.0)


# Adapters on meta

READS_THE_BASE: dict[str, PeftConfig | str] = {
    "pissa": LoraConfig(r=2, init_lora_weights="pissa", **run.SOME),
    "olora": LoraConfig(r=2, init_lora_weights="olora", **run.SOME),
    "mica": LoraConfig(r=2, init_lora_weights="mica", **run.SOME),
    "dora": LoraConfig(r=2, use_dora=True, **run.SOME),
    "DELORA": "DELORA",
    "OSF": "OSF",
    "LN_TUNING": "LN_TUNING",
    "SHIRA": "SHIRA",
    "TRAINABLE_TOKENS": "TRAINABLE_TOKENS",
}


def started(name: str, base: LlamaForCausalLM, on_meta: bool) -> PeftModel:
    config = READS_THE_BASE[name]
    model = get_peft_model(
        base, run.METHODS[config]() if isinstance(config, str) else config, low_cpu_mem_usage=on_meta
    )
    assert any(p.is_meta for p in model.parameters()) == on_meta
    return model


def on_meta_in_an_engine(folder: str) -> dict[str, Any]:
    sharding.disable_deepspeed_op_builds()
    keep = HfDeepSpeedConfig(config_of(zero_at(3), run.PER_MICRO_BATCH // 2))
    report = {}
    for name in READS_THE_BASE:
        base = LlamaForCausalLM.from_pretrained(folder)
        assert all(sharding.is_partitioned(p) for p in base.parameters())
        model = started(name, base, on_meta=True)
        trainable = [p for p in model.parameters() if p.requires_grad]
        # Ranks whose chance differs must not drift apart.
        torch.manual_seed(dist.get_rank())
        in_engine(model, 3, torch.optim.SGD(trainable, lr=RATE))
        report[name] = {"state": get_peft_model_state_dict(model), "logits": run.evaluate(model)}
    del keep
    return report


def test_adapters_on_meta_start_when_the_engine_is_built(tmp_path: Path) -> None:
    base = run.base().float()
    del base.first
    base.save_pretrained(tmp_path)
    first, second = run_on_ranks(on_meta_in_an_engine, 2, str(tmp_path))
    for name in READS_THE_BASE:
        torch.manual_seed(0)
        one = started(name, LlamaForCausalLM.from_pretrained(tmp_path), on_meta=False)
        assert furthest(first[name]["state"], second[name]["state"]) == 0, name
        assert torch.equal(first[name]["logits"], second[name]["logits"]), name
        # A start that draws draws elsewhere here; what is saved of the others is the base's.
        torch.testing.assert_close(first[name]["logits"], run.evaluate(one), rtol=0, atol=1e-5)
