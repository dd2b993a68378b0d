"""Dropout of LoRA and its kin while training, beside HF PEFT: the same entries dropped in both libraries."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor

import peft_dist
from tests.contract import bases

IDS = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(0))
CASES = [
    ("llama", "LoraConfig", {}),
    ("llama", "LoraConfig", {"use_dora": True}),
    ("llama", "LoraConfig", {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    ("gpt2", "LoraConfig", {"use_dora": True, "fan_in_fan_out": True}),
    ("llama", "LoraConfig", {"lora_bias": True}),
    ("llama", "AdaLoraConfig", {"total_step": 10}),
]


def every_third(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not p:
        return x
    return x * (torch.arange(x.shape[-1]) % 3 != 0) / (1 - p)


@pytest.mark.parametrize(("base", "config", "values"), CASES, ids=str)
def test_what_is_dropped_is_dropped_alike(base, config, values, monkeypatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "dropout", every_third)
    logits, norms = [], []
    for library in (peft_dist, peft):
        made = getattr(library, config)(lora_dropout=0.4, task_type="CAUSAL_LM", **values)
        model = library.get_peft_model(getattr(bases, base)(), made).train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if "lora_" in name and p.requires_grad and "magnitude" not in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
        outputs = model(input_ids=IDS, labels=IDS)
        outputs.loss.backward()
        logits.append(outputs.logits.detach())
        norms.append(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
        # It drops: without it the model says something else.
        assert (model.eval()(input_ids=IDS).logits - logits[-1]).abs().max() > 1e-3
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*norms, rtol=1e-4, atol=0)
