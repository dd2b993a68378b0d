"""Bone against HF PEFT's MiSS, which is the same method with other names."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_dist
from tests.contract import bases
from tests.contract.test_peft_parity import compare, disturb

CONFIGS = {
    "plain": {"r": 8},
    "with a rest": {"r": 5, "bias": "all"},
    "bat": {"r": 4, "init_weights": "bat", "target_modules": ["q_proj", "up_proj"]},
}


def renamed(folder, old: str, new: str) -> None:
    """A checkpoint under the other name, as HF PEFT's script converts it."""
    file = folder / "adapter_model.safetensors"
    save_file({key.replace(f".{old}_", f".{new}_"): t for key, t in load_file(file).items()}, file)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["peft_type"] = new.upper()
    if new == "bone":
        # What a Bone config of that time had not.
        del config["miss_dropout"], config["mini_r"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_old_bone_checkpoints_are_read(name, tmp_path) -> None:
    theirs = peft.get_peft_model(bases.llama(), peft.MissConfig(task_type="CAUSAL_LM", **CONFIGS[name]))
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    renamed(tmp_path, "miss", "bone")
    ours = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path, is_trainable=True)
    assert type(ours.peft_config["default"]) is peft_dist.BoneConfig
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    mine, others = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "ours", tmp_path))
    assert mine.keys() == others.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_ours_is_their_miss(name, tmp_path) -> None:
    ours = peft_dist.get_peft_model(
        bases.llama(), peft_dist.BoneConfig(task_type="CAUSAL_LM", **CONFIGS[name])
    )
    disturb(ours)
    ours.save_pretrained(tmp_path)
    renamed(tmp_path, "bone", "miss")
    theirs = peft.PeftModel.from_pretrained(bases.llama(), tmp_path, is_trainable=True)
    again = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path, is_trainable=True)
    compare(again, theirs, True, "miss")
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)
