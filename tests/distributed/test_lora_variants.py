"""LoRA's variants on a base that ZeRO-3 partitions over two ranks: one process's logits, gradients, merge and file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peft_dist
from peft_dist.errors import ConfigError
from peft_dist.model import PeftModel
from peft_dist.sharding import is_partitioned, partition_base
from tests.contract import bases
from tests.ranks import run_on_ranks

ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
IDS = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(3))
Q = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
CONFIGS: dict[str, tuple[str, dict]] = {
    "dora": ("llama", {"use_dora": True}),
    "dora from pissa": ("llama", {"use_dora": True, "init_lora_weights": "pissa"}),
    "lora_bias": ("llama", {"lora_bias": True, "target_modules": ["q_proj"]}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
    "mica": ("llama", {"init_lora_weights": "mica"}),
    "loftq": ("llama", {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 2}}),
    "tokens": ("tied_llama", {"trainable_token_indices": IDS[0, :3].tolist()}),
    "tied": ("tied_llama", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "replicated": ("llama", {"layer_replication": [[0, 2], [0, 1]]}),
}


def disturbed(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, t in sorted(model.adapter_tensors().items()):
            if isinstance(t, nn.Parameter):
                t.add_(torch.randn(t.shape, generator=generator, dtype=t.dtype) * 0.1)


def outcome(name: str, partitioned: bool, folder: str) -> dict[str, Any]:
    make, values = CONFIGS[name]
    config = peft_dist.LoraConfig(**{**Q, **values})
    base = getattr(bases, make)()
    torch.manual_seed(0)
    model: Any
    if partitioned and config.layer_replication:
        model = peft_dist.PeftModelForCausalLM(base, None)
        partition_base(model, ZERO3)
        with pytest.raises(ConfigError, match=r"partitioned already.*Add this adapter before"):
            model.add_adapter("default", config)
        base = getattr(bases, make)()
        torch.manual_seed(0)
        model = peft_dist.get_peft_model(base, config)
        partition_base(model, ZERO3)
    elif partitioned:
        model = peft_dist.PeftModelForCausalLM(base, None)
        partition_base(model, ZERO3)
        model.add_adapter("default", config)
        model.set_adapter("default")
        assert all(is_partitioned(p) for n, p in model.named_parameters() if "base_layer" in n)
    else:
        model = peft_dist.get_peft_model(base, config)
    disturbed(model)
    outputs = model(input_ids=IDS, labels=IDS)
    outputs.loss.backward()
    made = {
        "logits": outputs.logits.detach(),
        **{key: t.grad for key, t in model.adapter_tensors().items() if t.grad is not None},
    }
    model.save_pretrained(folder)
    made["rows"] = model(input_ids=IDS, adapter_names=["default", "__base__", "default"]).logits.detach()
    if make == "llama" and "layer_replication" not in values:
        model.merge_adapter()
        made["merged"] = model(input_ids=IDS).logits.detach()
        model.unmerge_adapter()
        made["after"] = model(input_ids=IDS).logits.detach()
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_equal_one_process(name, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = outcome(name, False, str(tmp_path / "one"))
        for got in run_on_ranks(outcome, 2, name, True, str(tmp_path / "two")):
            assert got.keys() == wanted.keys()
            for key, value in wanted.items():
                # fp32: a gathered weight lies otherwise in memory, so that products may sum in another order.
                size = max(float(value.abs().max()), 1e-3)
                assert (got[key] - value).abs().max() <= 2e-5 * size, key
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        torch.testing.assert_close(files[1][key], value, rtol=1e-5, atol=1e-5)
    again = PeftModel.from_pretrained(getattr(bases, CONFIGS[name][0])(), tmp_path / "two")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, wanted["logits"], rtol=1e-4, atol=1e-4)
