"""The head for targets alone, beside the whole logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_dist
from orchestrator.train.tasks.head import for_targets
from orchestrator.train.tasks.loss import IGNORED, num_targets, target_loss

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **SIZES))


def rows():
    ids = torch.arange(30).reshape(3, 10)
    labels = ids.clone()
    labels[0, :4], labels[1, 7:], labels[2, 5] = IGNORED, IGNORED, IGNORED
    return ids, labels


def loss_and_gradients(model, ids, labels, is_picked):
    model.zero_grad()
    if is_picked:
        with for_targets(model, labels):
            logits = model(input_ids=ids).logits
        assert logits.shape == (num_targets(labels), 40)
    else:
        logits = model(input_ids=ids).logits
    loss = target_loss(logits, labels)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "config",
    [
        peft_dist.LoraConfig(
            r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        ),
        peft_dist.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=["lora", "virtual tokens"],
)
def test_loss_and_gradients_are_those_of_the_whole_logits(base, config):
    model = peft_dist.get_peft_model(base, config)
    ids, labels = rows()
    whole, wanted = loss_and_gradients(model, ids, labels, is_picked=False)
    picked, found = loss_and_gradients(model, ids, labels, is_picked=True)
    torch.testing.assert_close(picked, whole, rtol=1e-6, atol=0)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
    assert model(input_ids=ids).logits.shape[:2] != (num_targets(labels), 40), (
        "the hook went with its context"
    )


def test_a_batch_without_targets_has_a_gradient_all_the_same(base):
    model = peft_dist.get_peft_model(
        base, peft_dist.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    ids, labels = rows()
    loss, gradients = loss_and_gradients(model, ids, torch.full_like(labels, IGNORED), is_picked=True)
    assert loss == 0 and gradients and not any(gradient.any() for gradient in gradients.values())


def test_a_head_with_an_adapter_gives_all(base):
    config = peft_dist.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = peft_dist.get_peft_model(base, config)
    ids, labels = rows()
    with for_targets(model, labels):
        assert model(input_ids=ids).logits.shape == (3, 10, 40)


def test_a_base_that_is_not_transformers_gives_all():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 7)

        def get_output_embeddings(self):
            return self.head

        def forward(self, hidden):
            return SimpleNamespace(logits=self.head(hidden).reshape(3, 10, 7))

    with for_targets(Own(), rows()[1]):
        assert Own()(torch.zeros(3, 10, 4)).logits.shape == (3, 10, 7)
