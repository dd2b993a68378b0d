"""Jobs on 8-bit and 4-bit bases: what each key makes of the base, and that ranks train what one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.train.worker.model import load_frozen_base
from orchestrator.train.worker.run import train
from tests.ranks import run_on_ranks

from .ends import difference
from .tiny import job, plan, request, save_base

NF4 = {"load_in_4bit": True}
INT8 = {"load_in_8bit": True}
OFFLOAD = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}


def spec_of(folder: Path, bits: dict, **sections):
    made = job(folder, **sections)
    return made.model_copy(update={"model": made.model.model_copy(update=bits)})


def layer_of(folder: Path, bits: dict, precision: str = "fp32"):
    base = load_frozen_base(spec_of(folder, bits), precision, "cpu")
    return base.model.layers[0].self_attn.q_proj, base


def test_a_base_in_8_bits(tmp_path):
    layer, base = layer_of(tmp_path, INT8)
    assert layer.weight.dtype == torch.int8 and base.lm_head.weight.dtype == torch.float32
    assert layer_of(tmp_path, {})[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("keys", "precision", "expected"),
    [
        ({}, "fp32", ("nf4", True, torch.float32, torch.uint8)),
        ({}, "bf16", ("nf4", True, torch.bfloat16, torch.uint8)),
        ({"bnb_4bit_quant_type": "fp4"}, "fp32", ("fp4", True, torch.float32, torch.uint8)),
        ({"bnb_4bit_use_double_quant": False}, "fp32", ("nf4", False, torch.float32, torch.uint8)),
        ({"bnb_4bit_compute_dtype": "bfloat16"}, "fp32", ("nf4", True, torch.bfloat16, torch.uint8)),
        ({"bnb_4bit_quant_storage": "float32"}, "fp32", ("nf4", True, torch.float32, torch.float32)),
    ],
)
def test_each_key_of_a_base_in_4_bits(tmp_path, keys, precision, expected):
    layer, _ = layer_of(tmp_path, {**NF4, **keys}, precision)
    state = layer.weight.quant_state
    found = (state.quant_type, state.nested, layer.compute_dtype, layer.weight.dtype)
    assert found == expected


def on_rank(folder: Path, spec, made_plan, run: str):
    torch.set_num_threads(1)
    return train(request(folder, spec, made_plan, run=run))


@pytest.mark.parametrize(
    ("bits", "adapter"), [(INT8, {"r": 4}), (NF4, {"type": "loha", "r": 2})], ids=["int8-lora", "nf4-loha"]
)
def test_ranks_train_what_one_process_does_at_every_stage(tmp_path, bits, adapter):
    save_base(tmp_path / "base")
    spec = spec_of(tmp_path, bits, rows=11, adapter=adapter, training={"max_steps": 2, "learning_rate": 1e-3})
    (alone,) = run_on_ranks(on_rank, 1, tmp_path, spec, plan(micro=2, accumulation=2), "alone")
    plans = {f"zero{stage}": plan(workers=2, stage=stage) for stage in (1, 2, 3)}
    plans["offload"] = plan(workers=2, stage=3, deepspeed=OFFLOAD)
    for name, made in plans.items():
        both = run_on_ranks(on_rank, 2, tmp_path, spec, made, name)
        # two steps in fp32 over the same codes; bitsandbytes' int8 multiplies in fp16
        assert both[0].metrics["eval_loss"] == pytest.approx(alone.metrics["eval_loss"], rel=2e-4), name
        assert difference(alone, both[0]) < 2e-3, name
    dense = spec.model_copy(update={"model": job(tmp_path).model})
    (other,) = run_on_ranks(on_rank, 1, tmp_path, dense, plan(micro=2, accumulation=2), "dense")
    lost = abs(other.metrics["base.eval_loss"] - alone.metrics["base.eval_loss"])
    assert lost > 1e-5, "the base was not quantised"


def test_a_run_that_recomputes_goes_on_over_the_same_codes(tmp_path):
    training = {"num_epochs": 2, "gradient_checkpointing": True}
    spec = spec_of(tmp_path, NF4, rows=9, training=training)
    first = spec.model_copy(
        update={"training": spec.training.model_copy(update={"num_epochs": 1, "lr_scheduler": "constant"})}
    )
    whole = spec.model_copy(
        update={"training": spec.training.model_copy(update={"lr_scheduler": "constant"})}
    )
    sharded = plan(workers=2, stage=3, micro=1)
    (end, _) = run_on_ranks(on_rank, 2, tmp_path, whole, sharded, "whole")
    run_on_ranks(on_rank, 2, tmp_path, first, sharded, "parts")
    (again, _) = run_on_ranks(on_rank, 2, tmp_path, whole, sharded, "parts")
    assert end.steps == again.steps == 4 and difference(end, again) == 0
