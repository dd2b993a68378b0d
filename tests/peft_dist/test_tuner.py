"""The class of each method stands on a base by itself, and counts and prints as HF PEFT does."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import peft_dist
from peft_dist import functional
from peft_dist.adapted import AdapterModule
from peft_dist.catalog import METHODS, config_class, prefix_of
from peft_dist.errors import AdapterError, ConfigError, MergeError, TargetError
from peft_dist.tuner import class_name, tuner_class
from tests.contract import bases, pairs
from tests.contract.methods_table import inputs
from tests.peft_dist.test_compat import ON_LAYERS, both

IDS = torch.arange(1, 15).view(2, 7)
ALONE = [name for name in METHODS if not config_class(name).is_prompt_learning]


def base() -> nn.Module:
    made = bases.llama().eval()
    made.config.use_cache = False
    return made


def logits(model, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **inputs(name)).logits


def disturb(model) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALONE)
def test_the_class_of_a_method_stands_by_itself(name) -> None:
    bare = base()(IDS).logits.detach()
    model = tuner_class(name)(base(), pairs.config(name), "default").eval()
    assert isinstance(model, peft_dist.BaseTuner) and type(model).__name__ == class_name(name)
    assert getattr(peft_dist, class_name(name)) is type(model)
    assert model.prefix == prefix_of(name) and model.active_adapters == ["default"]
    assert model.model.peft_config is model.peft_config and list(model.peft_config) == ["default"]
    assert any(p.requires_grad for p in model.parameters())
    disturb(model)
    want = logits(model, name)
    assert not torch.allclose(want, bare, atol=1e-3)
    model.disable_adapter_layers()
    torch.testing.assert_close(logits(model, name) if name != "XLORA" else bare, bare)
    assert not any(p.requires_grad for p in model.parameters())
    model.enable_adapter_layers()
    torch.testing.assert_close(logits(model, name), want)
    if config_class(name).merges:
        model.merge_adapter()
        torch.testing.assert_close(logits(model, name), want, rtol=1e-3, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model, name), want)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, want, rtol=1e-3, atol=1e-4)
        assert not any(isinstance(m, AdapterModule) for m in merged.modules())
        assert not hasattr(merged, "peft_config")
    else:
        with pytest.raises(MergeError, match="cannot be merged"):
            model.merge_adapter()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in ALONE if name != "XLORA"])
def test_adapters_come_and_go(name) -> None:
    bare = base()(IDS).logits.detach()
    model = tuner_class(name)(base(), {"a": pairs.config(name)}, "a").eval()
    disturb(model)
    want = logits(model, name)
    model.peft_config["b"] = pairs.config(name)
    model.inject_adapter(model.model, "b")
    torch.testing.assert_close(logits(model, name), want)
    model.set_adapter("b")
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(".a." in key or key.endswith(".a") for key in trained)
    model.delete_adapter("b")
    assert model.active_adapter == "a"
    torch.testing.assert_close(logits(model, name), want)
    with pytest.raises(AdapterError, match="the model has none of this name"):
        model.set_adapter("b")
    with pytest.raises(AdapterError, match="the model has none of this name"):
        model.delete_adapter("b")
    unloaded = model.unload()
    torch.testing.assert_close(unloaded(IDS).logits, bare)
    assert not any(isinstance(m, AdapterModule) for m in unloaded.modules())


def test_arguments_that_are_wrong() -> None:
    config = peft_dist.LoraConfig(target_modules=["q_proj"])
    for make, error, message in (
        (lambda: peft_dist.LoraModel(config, base()), TypeError, "the config is given first"),
        (lambda: peft_dist.LoraModel(base(), 3), TypeError, "got a LlamaForCausalLM and a int"),
        (
            lambda: peft_dist.LoraModel(base(), {"a": config}, "b"),
            TypeError,
            "the configs are of a, not of 'b'",
        ),
        (lambda: peft_dist.IA3Model(base(), config), ConfigError, "LoraConfig is a config of LORA"),
        (
            lambda: peft_dist.LoraModel(base(), peft_dist.LoraConfig(target_modules=["x"]), "a"),
            TargetError,
            "'x' matched none of",
        ),
        (lambda: peft_dist.LoraModel(base(), config, "a/b"), AdapterError, "a name has no '/'"),
    ):
        with pytest.raises(error, match=message):
            make()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ON_LAYERS)
def test_the_line_of_counts_is_theirs(name, capsys) -> None:
    for model in both(name):
        model.print_trainable_parameters()
    mine, other = capsys.readouterr().out.strip().splitlines()
    assert mine == other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in METHODS if config_class(n).is_prompt_learning])
def test_the_line_of_counts_of_prompts_is_theirs(name, capsys) -> None:
    values = pairs.config(name, task_type="CAUSAL_LM").to_dict()
    kept = {key: value for key, value in values.items() if value is not None and key != "peft_version"}
    kept.pop("num_transformer_submodules", None)
    ours = peft_dist.get_peft_model(bases.llama(), peft_dist.get_peft_config(kept))
    theirs = peft.get_peft_model(bases.llama(), peft.get_peft_config(kept))
    for model in (ours, theirs):
        model.print_trainable_parameters()
    mine, other = capsys.readouterr().out.strip().splitlines()
    assert mine == other


def test_a_model_without_a_class_and_one_with_it_are_one() -> None:
    injected = functional.inject_adapter_in_model(peft_dist.LoraConfig(target_modules=["q_proj"]), base())
    assert list(injected.peft_config) == ["default"]
