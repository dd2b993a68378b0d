"""LoRA+'s groups beside HF PEFT's."""

from __future__ import annotations

import peft
import pytest
import torch

import peft_dist
from peft_dist.errors import OptimizerError
from tests.contract import bases

CONFIGS = [
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"bias": "lora_only"},
    {"use_dora": True},
    {"lora_bias": True, "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_groups_are_theirs(values) -> None:
    groups = []
    for library in (peft_dist, peft):
        config = library.LoraConfig(r=4, task_type="CAUSAL_LM", **values)
        model = library.get_peft_model(bases.llama(), config)
        optimizer = library_of(library)(
            model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=3.0, loraplus_weight_decay=0.1, eps=1e-7
        )
        assert optimizer.defaults["eps"] == 1e-7
        groups.append(
            [
                (g["lr"], g["weight_decay"], sorted(tuple(p.shape) for p in g["params"]))
                for g in optimizer.param_groups
            ]
        )
    assert groups[0] == groups[1]


def library_of(library):
    if library is peft_dist:
        return peft_dist.create_loraplus_optimizer
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer


def test_rates_are_positive() -> None:
    model = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(OptimizerError, match=r"loraplus_lr_ratio is 0.0; it is above 0"):
        peft_dist.create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=0.0)
