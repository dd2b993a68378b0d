"""On a partitioned layer an adapter runs within the layer's own call, as one node of the graph."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dist import LoHaConfig, LoraConfig, get_peft_model
from peft_dist.adapted.layer import Adapted
from peft_dist.methods.weight import lora
from peft_dist.sharding import elements_at_rest, is_partitioned, partition_base
from tests.ranks import run_on_ranks

TARGETS = ["q_proj", "v_proj", "down_proj"]
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    model = get_peft_model(base, config).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return model


def step(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.requires_grad}


def sharded(config: Any, runs_within: bool) -> tuple[int, float, int]:
    """How often the node ran, the largest difference of a gradient from one process's, what rests whole."""
    alone = step(model_of(config))
    model = model_of(config)
    partition_base(model, ZERO3)
    with (
        mock.patch.object(lora.fused, "low_rank", side_effect=lora.fused.low_rank) as node,
        mock.patch.object(Adapted, "_runs_within", Adapted._runs_within if runs_within else lambda *_: False),
    ):
        found = step(model)
    # gradients of about one; sums in another order
    worst = max(float((found[name] - alone[name]).abs().max()) for name in alone)
    whole = sum(each.numel() for each in model.parameters() if is_partitioned(each))
    assert elements_at_rest(model) > whole
    return node.call_count, worst, whole


@pytest.mark.parametrize("runs_within", [True, False])
def test_gradients_are_one_process_s_and_nothing_stays_whole(runs_within):
    config = LoraConfig(r=3, target_modules=TARGETS, task_type="CAUSAL_LM")
    for calls, worst, whole in run_on_ranks(sharded, 2, config, runs_within):
        assert calls == (6 if runs_within else 0)
        assert worst < 1e-6 and whole == 0


def recomputed(config: Any) -> tuple[int, float]:
    """How often the adapters ran in a step, the largest difference of a gradient from one process's."""
    alone = step(model_of(config))
    model = model_of(config)
    partition_base(model, ZERO3)
    with mock.patch.object(Adapted, "_through", autospec=True, side_effect=Adapted._through) as through:
        found = step(model)
    return through.call_count, max(float((found[name] - alone[name]).abs().max()) for name in alone)


@pytest.mark.parametrize(("config", "times"), [(LoHaConfig, 2), (LoraConfig, 1)])
def test_what_is_of_a_weight_s_size_is_made_again_in_the_backward(config, times):
    for calls, worst in run_on_ranks(
        recomputed, 2, config(r=2, target_modules=TARGETS, task_type="CAUSAL_LM")
    ):
        assert calls == times * 6
        assert worst < 1e-6
