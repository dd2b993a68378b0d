"""LoRA+'s groups and LoRA-FA's steps beside HF PEFT's."""

from __future__ import annotations

import peft
import pytest
import torch

import peft_dist
from peft_dist.errors import OptimizerError
from peft_dist.lora_optimizers.lorafa import LoraFAOptimizer, create_lorafa_optimizer
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


def test_lorafa_steps_are_theirs(monkeypatch) -> None:
    from peft.optimizers import create_lorafa_optimizer as theirs
    from peft.optimizers import lorafa

    # HF PEFT rounds a product to bf16.
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    weights = []
    ids = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(3))
    for library in (peft_dist, peft):
        config = library.LoraConfig(
            r=4, lora_alpha=6, task_type="CAUSAL_LM", rank_pattern={"q_proj": 2}, modules_to_save=["lm_head"]
        )
        model = library.get_peft_model(bases.llama(), config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        make = create_lorafa_optimizer if library is peft_dist else theirs
        optimizer = make(model, r=4, lora_alpha=6, lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(peft_dist_state(library, model))
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-4, atol=1e-5)


def peft_dist_state(library, model) -> dict[str, torch.Tensor]:
    return {key: t.clone() for key, t in library.get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "q_proj"]], ids=len)
def test_lorafa_of_an_embedding_learns_nothing_in_theirs(targets) -> None:
    """There A starts at zero and stays so, and with it B's gradient."""
    from peft.optimizers import create_lorafa_optimizer as theirs

    moved = {}
    ids = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(3))
    for library, make in ((peft, theirs), (peft_dist, create_lorafa_optimizer)):
        config = library.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", target_modules=targets)
        model = library.get_peft_model(bases.llama(), config)
        if library is peft_dist and len(targets) == 1:
            with pytest.raises(OptimizerError, match="trains no LoRA on a layer other than an embedding"):
                make(model, r=4, lora_alpha=6, lr=1e-2)
            continue
        before = peft_dist_state(library, model)
        optimizer = make(model, r=4, lora_alpha=6, lr=1e-2)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        after = peft_dist_state(library, model)
        embedding = [key for key in after if "embedding" in key]
        moved[library] = any(not torch.equal(before[key], after[key]) for key in embedding)
    assert moved == ({peft: False, peft_dist: True} if len(targets) == 2 else {peft: False})


def test_what_lorafa_refuses() -> None:
    model = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(OptimizerError, match="use_rslora is True, but the configs of default say otherwise"):
        create_lorafa_optimizer(model, 8, 8, 1e-3, use_rslora=True)
    with pytest.warns(FutureWarning, match="use_rslora is deprecated"):
        optimizer = create_lorafa_optimizer(model, 8, 8, 1e-3, use_rslora=False)
    assert all(p.requires_grad != ("lora_A" in n) for n, p in model.named_parameters() if "lora_" in n)
    with pytest.raises(OptimizerError, match=r"lr is -1; it lies in \[0, inf\)"):
        LoraFAOptimizer(optimizer.param_groups[0]["params"], {}, lr=-1)
    with pytest.raises(OptimizerError, match="trains no LoRA"):
        create_lorafa_optimizer(bases.llama(), 8, 8, 1e-3)
