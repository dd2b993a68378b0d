"""Every method of the catalog as `adapter.type` of a job: it trains, and a run that stopped goes on to the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.spec.adapter import method_names
from orchestrator.train.run import train
from peft_dist.catalog import METHODS

from ..spec.jobs import NEEDED
from .test_run import Recorder
from .tiny import job, plan, request

# Sizes that fit a base of 2 layers x 32, whose keys and values are 16 wide.
SMALL: dict[str, dict] = {
    **NEEDED,
    **{
        name: {"r": 4}
        for name in ("lora", "loha", "lokr", "miss", "bone", "hra", "randlora", "delora", "shira")
    },
    "adalora": {"init_r": 4, "target_r": 2},
    "vera": {"r": 8},
    "gralora": {"r": 4, "gralora_k": 2},
    "poly": {"r": 2, "n_skills": 2},
    "oft": {"oft_block_size": 4},
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 20},
    "waveft": {"n_frequency": 20},
    "road": {"group_size": 8},
    "vblora": {"num_vectors": 16, "vector_length": 8, "topk": 2},
    "ln_tuning": {"target_modules": ["input_layernorm", "norm"]},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
}
OWN_ROWS = {"xlora": "it joins adapters that are there already"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def adapter_of(end) -> dict[str, torch.Tensor]:
    return load_file(Path(end.adapter_dir) / "adapter_model.safetensors")


METHOD_NAMES = [
    name
    for name in method_names()
    if name not in OWN_ROWS and "CAUSAL_LM" in METHODS[name.upper()].task_types
]


@pytest.mark.parametrize("kind", METHOD_NAMES)
def test_it_trains_and_a_stopped_run_goes_on_to_the_same(kind, tmp_path):
    spec = job(
        tmp_path,
        rows=9,
        adapter={"type": kind, **SMALL.get(kind, {})},
        training={"num_epochs": 2, "save_steps": 1},
    )
    told = Recorder()
    whole = train(request(tmp_path, spec, plan(micro=2), run="whole"), reporter=told)
    assert whole.steps == 4 and whole.metrics["eval_loss"] != whole.metrics["base.eval_loss"]
    assert all(event["grad_norm"] > 0 for event in told.of("progress")[1:])
    first = train(request(tmp_path, spec, plan(micro=2), run="parts"), reporter=Recorder(stop_after=2))
    assert first.is_stopped and first.steps == 2
    second = train(request(tmp_path, spec, plan(micro=2), run="parts"))
    one, two = adapter_of(whole), adapter_of(second)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {k: v for k, v in second.metrics.items() if k != "train_loss"} == {
        k: v for k, v in whole.metrics.items() if k != "train_loss"
    }
