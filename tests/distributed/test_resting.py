"""What a rank holds of a partitioned base between a forward and its backward: not the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dist import LoraConfig, get_peft_model, load_base
from peft_dist.resting import RestingLinear
from tests.distributed import one_process as run
from tests.ranks import run_on_ranks

IDS = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(5))


def llama() -> LlamaForCausalLM:
    """Eight layers, so that all of them are more than the two that may be whole at once."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=8, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def held(folder: str, way: str) -> tuple[int, list[float]]:
    """Elements of linear layers whose storage is there after the last of three forwards, the most of a rank; and the
    losses."""
    more = {"stage3_max_live_parameters": 10**9} if way == "fetching ahead" else {}
    # Less than a layer in one go, as jobs have it.
    config = {
        "zero_optimization": {**run.ZERO3["zero_optimization"], "stage3_prefetch_bucket_size": 230, **more}
    }
    stage = 0 if way == "one process" else 3
    base = load_base(folder, "CAUSAL_LM", "float32", None, stage, deepspeed=config if stage else None)
    base.requires_grad_(False)
    if way == "torch's linear":
        for layer in base.modules():
            if isinstance(layer, RestingLinear):
                layer.__class__ = nn.Linear
    # Most layers have no adapter: they are torch's own.
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    seen: dict[str, tuple[StorageWeakRef, int]] = {}
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Linear):

            def note(layer: nn.Linear, args: object, name: str = name) -> None:
                weight = layer.weight
                seen[name] = StorageWeakRef(weight.untyped_storage()), weight.numel()

            layer.register_forward_pre_hook(note)
    losses = []
    for number in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        if number == 2:
            whole = sum(size for storage, size in seen.values() if not storage.expired())
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    return whole, losses


@pytest.mark.parametrize("way", ["as it is", "fetching ahead", "torch's linear"])
def test_a_forward_leaves_two_layers_whole(tmp_path: Path, way: str) -> None:
    """Negative controls: with DeepSpeed's own limit of what it fetches ahead, and with torch's own linear layers, most
    of the base is still whole."""
    base = llama()
    base.save_pretrained(tmp_path)
    layer, head = max(map(size_of, base.model.layers)), size_of(base.lm_head)
    _, losses = held(str(tmp_path), "one process")
    for whole, ours in run_on_ranks(held, 2, str(tmp_path), way):
        assert ours == pytest.approx(losses, abs=1e-6)
        assert (whole <= 2 * layer + head) == (way == "as it is"), (whole, layer)


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
