"""A user's own `deepspeed.initialize(model, model_parameters=trainable)`, instead of AdapterOptimizer.

It trains, evaluates, merges and saves as one process does; loading into an adapter that it trains lasts;
what its fixed parameters cannot do is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from peft_dist import checkpoint, get_peft_model, merge, set_peft_model_state_dict, sharding
from peft_dist.checkpoint import WEIGHTS_NAME
from peft_dist.errors import ShardingError
from peft_dist.model import PeftModel
from tests.distributed import one_process as run
from tests.distributed.own_engine import own_engine
from tests.ranks import run_on_ranks

STEPS, RATE = 3, 0.1
# Odd sizes, so that pieces are padded; no dropout, since the engine's user brings no Rows.
METHODS = {
    "LORA": {"r": 3, "target_modules": ["q_proj", "v_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
}


def model_of(method: str) -> PeftModel:
    config = type(run.METHODS[method]())(**METHODS[method], task_type="CAUSAL_LM")
    torch.manual_seed(run.SEED)
    model = get_peft_model(run.base().float(), config)
    run.disturb(model)
    return model.train()


def given_values(model: PeftModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {
        key: sharding.whole_shape(p) for key, p in checkpoint.adapter_parameters(model, "default").items()
    }
    return {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes.items()}


def loss_of(model: Any, step: int) -> Tensor:
    """The mean over this rank's share; shares have equally many targets, so their mean is the batch's."""
    ids, _, _ = run.batch(step, 0)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return run.token_loss_sum(logits, ids) / ids[:, 1:].numel()


def alone(method: str, folder: str) -> dict[str, Any]:
    model = model_of(method)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        if step == 1:
            set_peft_model_state_dict(model, given_values(model))
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return finished(model, method, folder)


def finished(model: PeftModel, method: str, folder: str) -> dict[str, Any]:
    report = {"logits": run.evaluate(model)}
    run.saved(model, f"{folder}/{method}")
    if method != "PROMPT_TUNING":
        merge.merge(model.get_base_model())
        report["merged"] = run.evaluate(model)
    return report


def with_own_engine(stage: int, folder: str, masters: bool = True) -> dict[str, Any]:
    sharding.disable_deepspeed_op_builds()
    return {method: one_with_own_engine(method, stage, folder, masters) for method in METHODS}


def one_with_own_engine(method: str, stage: int, folder: str, masters: bool) -> dict[str, Any]:
    model = model_of(method)
    trainable = [p for p in model.parameters() if p.requires_grad]
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    engine = own_engine(
        model, torch.optim.SGD(trainable, lr=RATE), zero, run.PER_MICRO_BATCH // dist.get_world_size()
    )
    for step in range(STEPS):
        if step == 1:
            safe = "safe_set_local_fp32_param" if stage == 3 else "safe_set_full_fp32_param"
            with mock.patch.object(
                deepspeed.utils, safe, getattr(deepspeed.utils, safe) if masters else mock.Mock()
            ):
                set_peft_model_state_dict(model, given_values(model))
        engine.backward(loss_of(engine, step))
        engine.step()
    report = finished(model, method, folder)
    with pytest.raises(ShardingError) as caught:
        model.add_adapter("second", model.peft_config["default"])
    report["refusal"] = str(caught.value)
    report["adapters"] = list(model.peft_config)
    return report


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("alone")
    return {method: alone(method, str(folder)) for method in METHODS}, folder


# fp32: a sum of a few hundred terms in another order differs by 1e-6 of its size; logits are about 1.
CLOSE = {"rtol": 0.0, "atol": 5e-6}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_trains_loads_merges_and_saves_as_one_process(stage: int, expected: tuple, tmp_path: Path) -> None:
    one, folder = expected
    for report in run_on_ranks(with_own_engine, 2, stage, str(tmp_path)):
        for method, theirs in one.items():
            for key, value in theirs.items():
                torch.testing.assert_close(report[method][key], value, **CLOSE)
            assert report[method]["refusal"].startswith(
                "adapter 'second' cannot be added: a DeepSpeed engine trains "
            )
            assert report[method]["refusal"].endswith(
                "of this model, and an engine's parameters are fixed when it is built. Do this before "
                "deepspeed.initialize, or train with peft_dist.optim.AdapterOptimizer, which takes adapters "
                "at any "
                "time."
            )
            assert report[method]["adapters"] == ["default"]
    for method in METHODS:
        ours, theirs = (load_file(path / method / WEIGHTS_NAME) for path in (tmp_path, folder))
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], **CLOSE)


@pytest.mark.parametrize("stage", [2, 3])
def test_without_setting_its_masters_a_load_is_undone(stage: int, expected: tuple, tmp_path: Path) -> None:
    one, _ = expected
    for report in run_on_ranks(with_own_engine, 2, stage, str(tmp_path), False):
        for method, theirs in one.items():
            assert (report[method]["logits"] - theirs["logits"]).abs().max() > 1e-3, method
