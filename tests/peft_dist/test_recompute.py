"""Layers that are recomputed in the backward serve the rows that the forward named, though it is long over."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peft_dist

IDS = torch.randint(1, 32, (4, 6), generator=torch.Generator().manual_seed(1))
NAMES = ["a", "__base__", "b", "a"]


def model(dropout: float = 0.0) -> peft_dist.PeftModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).double()
    config = {"r": 2, "lora_dropout": dropout, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    made = peft_dist.get_peft_model(base, peft_dist.LoraConfig(**config), "a")
    made.add_adapter("b", peft_dist.LoraConfig(**config))
    made.set_requires_grad("b", True)
    return made.train()


def gradients(made: peft_dist.PeftModel) -> list[torch.Tensor]:
    made.zero_grad()
    made(IDS, adapter_names=NAMES).logits.square().mean().backward()
    tensors = [p for name in "ab" for p in made.adapter_tensors(name).values()]
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in tensors]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("by_the_base", [False, True])
def test_rows_named_in_a_forward_serve_its_backward(reentrant, by_the_base) -> None:
    made = model()
    wanted = gradients(made)
    owner = made.get_base_model() if by_the_base else made
    owner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    made.get_base_model().enable_input_require_grads()
    for got, expected in zip(gradients(made), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_without_remembering_the_gradients_are_others(monkeypatch) -> None:
    """The negative control: the same, with the mechanism taken away."""
    made = model()
    wanted = gradients(made)
    monkeypatch.setattr("peft_dist.recompute.remember", lambda modules, current: None)
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert any((g - w).abs().max() > 1e-6 for g, w in zip(gradients(made), wanted, strict=True))
