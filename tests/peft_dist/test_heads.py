"""A classifier's head is new on its base, so every adapter trains its own and saves it, whatever its method."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file

import peft_dist
from peft_dist.catalog import METHODS, config_class
from tests.contract import bases

OWN = {
    "TRAINABLE_TOKENS": {"token_indices": [3, 5], "target_modules": ["embed_tokens"]},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "VBLORA": {"num_vectors": 6, "vector_length": 4, "target_modules": ["q_proj"]},
    "ADALORA": {"total_step": 10, "target_modules": ["q_proj"]},
    "BOFT": {"boft_block_size": 4, "target_modules": ["q_proj"]},
    "IA3": {"target_modules": ["q_proj"], "feedforward_modules": []},
    "OFT": {"r": 2, "oft_block_size": 0, "target_modules": ["q_proj"]},
    "C3A": {"block_size": 4, "target_modules": ["q_proj"]},
    "GRALORA": {"r": 4, "target_modules": ["q_proj"]},
    "FOURIERFT": {"n_frequency": 10, "target_modules": ["q_proj"]},
    "WAVEFT": {"n_frequency": 10, "target_modules": ["q_proj"]},
    "MISS": {"r": 4, "target_modules": ["q_proj"]},
    "BONE": {"r": 4, "target_modules": ["q_proj"]},
    "SHIRA": {"r": 2, "target_modules": ["q_proj"]},
    "ROAD": {"group_size": 4, "target_modules": ["q_proj"]},
}


def values(name: str) -> dict:
    few = (
        {"num_virtual_tokens": 2} if config_class(name).is_prompt_learning else {"target_modules": ["q_proj"]}
    )
    return {"task_type": "SEQ_CLS", **OWN.get(name, few)}


# CPT is of causal models alone, and an X-LoRA's head is its own adapters'.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("CPT", "XLORA")])
def test_heads_are_trained_saved_and_loaded(name, tmp_path) -> None:
    model = peft_dist.get_peft_model(bases.classifier(), config_class(name)(**values(name)))
    head = {n: p for n, p in model.named_parameters() if "score.modules_to_save.default" in n}
    assert head and all(p.requires_grad for p in head.values())
    with torch.no_grad():
        for p in head.values():
            p.add_(1)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any(key.endswith("score.weight") for key in saved)
    ids = torch.arange(1, 7).view(2, 3)
    given = {"task_ids": torch.tensor([0, 0])} if name in ("POLY", "MULTITASK_PROMPT_TUNING") else {}
    again = peft_dist.PeftModel.from_pretrained(bases.classifier(), tmp_path).eval()
    torch.testing.assert_close(again(ids, **given).logits, model.eval()(ids, **given).logits)


@pytest.mark.filterwarnings("ignore")
def test_hf_peft_leaves_some_heads_at_random() -> None:
    for name in ("TRAINABLE_TOKENS", "ADAPTION_PROMPT"):
        theirs = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name](**copy.deepcopy(values(name)))
        model = peft.get_peft_model(bases.classifier(), theirs)
        assert not any("score" in n for n, p in model.named_parameters() if p.requires_grad)
