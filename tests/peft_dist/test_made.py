"""What an adapter makes for all its layers at once in one forward, and nobody can tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_dist
from peft_dist import fused
from peft_dist.catalog import METHODS, config_class
from peft_dist.made import Made, makes

IDS = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(2))


def tuned(**values) -> peft_dist.PeftModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).double()
    settings = {"r": 0, "oft_block_size": 8, "init_weights": False, "target_modules": "all-linear"} | values
    config = peft_dist.OFTConfig(**settings, task_type="CAUSAL_LM")
    return peft_dist.get_peft_model(base, config, autocast_adapter_dtype=False).double().train()


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """How many layers' rotations each call makes."""
    sizes: list[int] = []

    def rotations(Qs, run=fused.rotations):
        sizes.append(len(Qs))
        return run(Qs)

    monkeypatch.setattr(fused, "rotations", rotations)
    return sizes


def step(model: nn.Module, **more) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS, **more)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(got, wanted) -> None:
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-9, atol=1e-10)
    assert got[1].keys() == wanted[1].keys()
    for name in wanted[1]:
        torch.testing.assert_close(got[1][name], wanted[1][name], rtol=1e-8, atol=1e-9)


def without(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(Made, "at", lambda *_: {})
        return run()


def test_every_method_that_makes_something_is_tried_here():
    assert [name for name in METHODS if makes(config_class(name))] == ["OFT"]


def test_rotations_of_all_layers_are_made_at_once_and_give_what_each_layer_gives(made, monkeypatch):
    model = tuned()
    got = step(model)
    # 2 blocks of 7 layers, of 8 x 8 blocks all.
    assert made == [14]
    same(got, without(monkeypatch, lambda: step(model)))
    assert len(made) > 2 and max(made[1:]) < 14


def test_layers_of_other_block_sizes_are_made_apart(made, monkeypatch):
    model = tuned(r=2, oft_block_size=0)
    got = step(model)
    # Blocks of 16 for an input of 32, of 24 for one of 48.
    assert sorted(made) == [2, 12]
    same(got, without(monkeypatch, lambda: step(model)))


def test_a_changed_tensor_is_seen_at_the_next_forward(monkeypatch):
    model = tuned()
    before = step(model)[0]
    for name, parameter in model.named_parameters():
        if "oft_" in name:
            parameter.data.mul_(1.5)
    got = step(model)
    assert not torch.allclose(got[0], before)
    same(got, without(monkeypatch, lambda: step(model)))


def test_two_forwards_before_one_backward(monkeypatch):
    model = tuned()
    once = step(model)[1]
    model.zero_grad()
    (model(input_ids=IDS, labels=IDS).loss + model(input_ids=IDS, labels=IDS).loss).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, 2 * once[name])


def test_layers_that_do_not_run_get_no_gradient_of_others(monkeypatch):
    model = tuned()
    first = model.get_base_model().model.layers[0]
    monkeypatch.setattr(first, "forward", lambda x, *_, **__: x)
    got = step(model)
    assert all(not g.any() for n, g in got[1].items() if ".layers.0." in n)
    assert all(g.any() for n, g in got[1].items() if ".layers.1." in n)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant, made, monkeypatch):
    model = tuned()
    wanted = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    made.clear()
    same(step(model), wanted)
    assert 14 not in made


def test_nothing_is_made_where_no_gradient_is_wanted(made):
    model = tuned()
    with torch.no_grad():
        model(input_ids=IDS)
    assert 14 not in made


def test_with_two_adapters_each_for_its_rows(monkeypatch):
    model = tuned()
    torch.manual_seed(5)
    model.add_adapter("other", tuned().peft_config["default"])
    names = ["default", "other", "__base__"]
    model.base_model.set_requires_grad(["default", "other"])
    got = step(model, adapter_names=names)
    same(got, without(monkeypatch, lambda: step(model, adapter_names=names)))
