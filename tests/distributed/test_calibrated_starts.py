"""Starts that are found from data or from what quantisation lost, on a base that two ranks have partitioned: found
once, from the samples of all ranks, and equal to one process's on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaForCausalLM

import peft_dist
from peft_dist import load_base
from peft_dist.calibration import corda, eva, loftq
from peft_dist.errors import ConfigError
from peft_dist.loading import meta_base
from peft_dist.sharding import is_partitioned, partition_base
from tests.contract import bases
from tests.distributed.one_process import ZERO3, rank_and_world
from tests.ranks import run_on_ranks

IDS = torch.randint(1, 64, (4, 7), generator=torch.Generator().manual_seed(3))
Q: dict[str, Any] = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
CONFIGS: dict[str, Callable[[], Any]] = {
    "eva": lambda: peft_dist.LoraConfig(
        **Q, init_lora_weights="eva", eva_config=peft_dist.EvaConfig(rho=2.0, tau=0.9)
    ),
    "corda": lambda: peft_dist.LoraConfig(
        **Q, init_lora_weights="corda", corda_config=peft_dist.CordaConfig()
    ),
    "loftq": lambda: peft_dist.LoraConfig(
        **Q, init_lora_weights="loftq", loftq_config=peft_dist.LoftQConfig(4, 2)
    ),
}


def share() -> Tensor:
    """This rank's samples."""
    rank, world = rank_and_world()
    return IDS.chunk(world)[rank]


def whole(folder: str) -> LlamaForCausalLM:
    base = load_base(folder)
    if dist.is_initialized():
        partition_base(base, ZERO3)
    return base


def prepare(base: LlamaForCausalLM, config: Any) -> None:
    def run() -> None:
        for sample in share():
            base(input_ids=sample[None])

    corda.preprocess_corda(base, config, run)


def calibrate(model: Any, together: bool = True) -> None:
    eva.initialize_lora_eva_weights(
        model,
        [{"input_ids": share()}] * 3,
        gather_distributed_inputs=together,
        show_progress_bar=False,
    )


def started(name: str, folder: str) -> dict[str, Tensor]:
    """The adapter on a base that is there, and what the model then gives."""
    base, config = whole(folder), CONFIGS[name]()
    if name == "corda":
        prepare(base, config)
    return outcome(name, peft_dist.get_peft_model(base, config))


def filled_later(name: str, folder: str) -> dict[str, Tensor]:
    """The same where the base is on meta when the adapter is added."""
    model = peft_dist.get_peft_model(meta_base(folder), CONFIGS[name](), low_cpu_mem_usage=True)
    load_base(folder, zero_stage=3 if dist.is_initialized() else 0, into=model)
    return outcome(name, model)


def apart(name: str, folder: str) -> dict[str, Tensor]:
    """EVA that was not asked to put rows together."""
    with mock.patch.object(calibrate, "__defaults__", (False,)):
        return started(name, folder)


def mended(name: str, folder: str) -> dict[str, Tensor]:
    """LoRA that makes good what quantisation lost."""
    base = load_base(folder, quantization="nf4", zero_stage=3 if dist.is_initialized() else 0)
    model = peft_dist.get_peft_model(base, peft_dist.LoraConfig(**Q))
    loftq.replace_lora_weights_loftq(model, folder)
    return outcome(name, model)


def outcome(name: str, model: Any) -> dict[str, Tensor]:
    if name == "eva":
        calibrate(model)
    assert not dist.is_initialized() or all(
        is_partitioned(p) for key, p in model.named_parameters() if "lora_" not in key
    )
    state = {key: t.detach().clone() for key, t in model.adapter_tensors().items()}
    with torch.no_grad():
        state["logits"] = model(input_ids=IDS).logits
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("base")
    bases.llama().save_pretrained(place)
    return str(place)


def check(make: Any, name: str, folder: str, alone: Any = started) -> None:
    one = alone(name, folder)
    first, second = run_on_ranks(make, 2, name, folder)
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_partitioned_base_they_are_one_process_s_on_every_rank(name: str, folder: str) -> None:
    check(started, name, folder)


@pytest.mark.parametrize("name", ["eva", "loftq"])
def test_on_a_base_that_is_filled_later_too(name: str, folder: str) -> None:
    check(filled_later, name, folder)


def test_what_quantisation_lost_is_found_on_a_partitioned_base(folder: str) -> None:
    check(mended, "mended", folder, mended)


def test_samples_of_one_rank_alone_part_the_ranks(folder: str) -> None:
    with mock.patch.object(corda, "_of_all_ranks", lambda layers, sums, counts: counts):
        first, second = run_on_ranks(started, 2, "corda", folder)
    assert not any(torch.equal(first[key], second[key]) for key in first if "lora_A" in key)


def test_eva_puts_rows_together_where_ranks_must_run_equally_often(folder: str) -> None:
    check(apart, "eva", folder)


@pytest.mark.parametrize(
    "find",
    [
        lambda model: corda.preprocess_corda(model.get_base_model(), CONFIGS["corda"](), lambda: None),
        lambda model: eva.get_eva_state_dict(model, [{"input_ids": IDS}], CONFIGS["eva"]()),
        lambda model: loftq.replace_lora_weights_loftq(model),
    ],
)
def test_a_base_without_values_is_refused_in_words(find: Callable[[Any], Any], folder: str) -> None:
    model = peft_dist.get_peft_model(meta_base(folder), peft_dist.LoraConfig(**Q), low_cpu_mem_usage=True)
    with pytest.raises(ConfigError, match=r"on the meta device and have no values. Load the base first"):
        find(model)


def test_corda_unprepared_on_a_base_filled_later_says_what_to_do(folder: str) -> None:
    model = peft_dist.get_peft_model(meta_base(folder), CONFIGS["corda"](), low_cpu_mem_usage=True)
    with pytest.raises(ConfigError, match=r"is not prepared. Call preprocess_corda"):
        load_base(folder, into=model)
