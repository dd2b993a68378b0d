"""What the adapters of a model are doing is reported as HF PEFT reports it."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch

import peft_dist
from peft_dist.catalog import config_class
from tests.contract import bases
from tests.peft_dist.test_compat import ON_LAYERS, both


def answers(library, model) -> tuple[dict, list[dict]]:
    whole = dataclasses.asdict(library.get_model_status(model))
    return whole, [dataclasses.asdict(layer) for layer in library.get_layer_status(model)]


def alike(ours, theirs) -> None:
    mine, other = answers(peft_dist, ours), answers(peft, theirs)
    assert mine[0] == other[0]
    assert mine[1] == other[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ON_LAYERS)
def test_status_of_each_method(name) -> None:
    alike(*both(name))


@pytest.mark.filterwarnings("ignore")
def test_status_through_a_models_life() -> None:
    ours, theirs = both("LORA", modules_to_save=["lm_head"])
    alike(ours, theirs)
    for library, model in ((peft_dist, ours), (peft, theirs)):
        model.add_adapter("other", library.LoraConfig(target_modules=["k_proj", "q_proj"]))
    alike(ours, theirs)
    for model in (ours, theirs):
        model.set_adapter("other")
    alike(ours, theirs)
    for model in (ours, theirs):
        model.base_model.merge_adapter()
    alike(ours, theirs)
    for model in (ours, theirs):
        model.base_model.unmerge_adapter()
        model.base_model.disable_adapter_layers()
    alike(ours, theirs)
    for model in (ours, theirs):
        model.base_model.enable_adapter_layers()
    alike(ours, theirs)
    # Theirs keeps the wrappers of layers that only the deleted adapter sat on, and so disagrees with itself.
    ours.delete_adapter("other")
    status = peft_dist.get_model_status(ours)
    assert status.active_adapters == status.available_adapters == ["default"]
    assert status.requires_grad == {"default": True} and status.num_adapter_layers == 5


def test_disagreement_is_irregular() -> None:
    ours, theirs = both("LORA")
    for model in (ours, theirs):
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        layer.lora_A["default"].weight.requires_grad_(False)
        layer.enable_adapters(False)
    mine, other = peft_dist.get_model_status(ours), peft.get_model_status(theirs)
    assert mine.enabled == other.enabled == "irregular"
    assert mine.requires_grad == other.requires_grad == {"default": "irregular"}


def test_models_without_a_class_around_them() -> None:
    values = {"target_modules": ["q_proj"]}
    ours = peft_dist.inject_adapter_in_model(peft_dist.LoraConfig(**values), bases.llama())
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**values), bases.llama())
    assert dataclasses.asdict(peft_dist.get_model_status(ours)) == dataclasses.asdict(
        peft.get_model_status(theirs)
    )
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    peft_dist.inject_adapter_in_model(config_class("LORA")(r=2, target_modules=["0"]), plain)
    assert peft_dist.get_model_status(plain).base_model_type == "other"


def test_no_layers() -> None:
    with pytest.raises(ValueError, match="No adapter layers found"):
        peft_dist.get_layer_status(bases.llama())
    model = peft_dist.get_peft_model(
        bases.llama(), peft_dist.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    for ask in (peft_dist.get_layer_status, peft_dist.get_model_status):
        with pytest.raises(TypeError, match="sits on no layers"):
            ask(model)
