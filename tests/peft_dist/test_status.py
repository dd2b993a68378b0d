"""What the adapters of a model are doing is reported as HF PEFT reports it."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from torch import nn

import peft_dist
from peft_dist.catalog import config_class
from peft_dist.errors import AdapterError, RowsError
from tests.contract import bases
from tests.peft_dist.test_compat import ON_LAYERS, both

BOTH = (peft, peft_dist)
IDS = torch.arange(1, 9).view(2, 4)


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


def place(model: nn.Module, name: str) -> nn.Module:
    return model.get_base_model().get_submodule(name)  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(
    ("beside", "name"),
    [({"modules_to_save": ["lm_head"]}, "lm_head"), ({"trainable_token_indices": [1]}, "model.embed_tokens")],
    ids=["whole module", "tokens"],
)
def test_what_is_trained_beside_an_adapter_names_its_own_alone(beside, name) -> None:
    told = []
    for library in BOTH:
        targets = {"target_modules": ["q_proj"], "r": 2}
        model = library.get_peft_model(bases.llama(), library.LoraConfig(**targets))
        model.add_adapter("b", library.LoraConfig(**targets, **beside))
        told.append([])
        for names in (["default"], ["b"], ["default", "b"]):
            model.base_model.set_adapter(names)
            here = place(model, name).active_adapters
            told[-1].append((here, place(model, "model.layers.0.self_attn.q_proj").active_adapters))
            told[-1].append([layer.active_adapters for layer in library.get_layer_status(model)])
        model.delete_adapter("b")
        model.set_adapter("default")
        model(input_ids=IDS)
        told[-1].append(model.active_adapters)
    assert told[0] == told[1]
    assert told[0][0] == ([], ["default"]) and told[0][2] == (["b"], ["b"])


def tuned(library) -> nn.Module:
    """Two adapters of LN_TUNING with other values than the base's, `default` active."""
    model = library.get_peft_model(bases.llama(), library.LNTuningConfig(target_modules=["norm"]))
    model.add_adapter("b", library.LNTuningConfig(target_modules=["norm"]))
    for adapter, factor in (("default", 2.0), ("b", 3.0)):
        for key, tensor in model.named_parameters():
            if f".{adapter}." in key:
                tensor.data.mul_(factor)
    return model.eval()


def test_merged_norms_serve_whichever_adapter_is_active() -> None:
    seen = []
    for library in BOTH:
        model, outputs, told = tuned(library), [], []
        for act in (
            lambda m: None,
            lambda m: m.merge_adapter(["b"]),
            lambda m: m.unmerge_adapter(),
            lambda m: m.merge_adapter(),
            lambda m: m.set_adapter("b"),
        ):
            act(model)
            outputs.append(model(input_ids=IDS).logits)
            layer, whole = library.get_layer_status(model)[0], library.get_model_status(model)
            told.append(
                (list(layer.merged_adapters), whole.merged_adapters, place(model, "model.norm").merged)
            )
        seen.append((told, outputs))
    assert seen[0][0] == seen[1][0]
    assert [merged for merged, _, _ in seen[1][0]] == [[], ["b"], [], ["default"], []]
    for theirs, mine in zip(seen[0][1], seen[1][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_merged_norm_is_served_alone() -> None:
    model = tuned(peft_dist)
    bare, active = bases.llama()(input_ids=IDS).logits, model(input_ids=IDS).logits
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, bare)
    assert torch.equal(model(input_ids=IDS).logits, active)
    with pytest.raises(
        RowsError, match=r"model\.norm: \['default'\] are merged. Unmerge to name adapters per row"
    ):
        model(input_ids=IDS, adapter_names=["b", "default"])
    with pytest.raises(AdapterError, match=r"merged\. Unmerge it before deleting"):
        model.delete_adapter("default")
    merged = model.merge_and_unload()
    assert torch.equal(merged(input_ids=IDS).logits, active)


def test_merging_a_second_norm_is_refused() -> None:
    models = [tuned(library) for library in BOTH]
    for model in models:
        model.merge_adapter()
    with pytest.warns(UserWarning, match="Already merged with"):
        models[0].merge_adapter(["b"])
    assert place(models[0], "model.norm").merged_adapters == ["b"]
    with pytest.raises(
        AdapterError, match="'default' stands in the module's place, so 'b' cannot act on it too"
    ):
        models[1].merge_adapter(["b"])
    assert place(models[1], "model.norm").merged_adapters == ["default"]


@pytest.mark.parametrize("names", [["__base__"] * 5, ["default"] * 5, ["default", "__base__"]], ids=len)
def test_names_for_other_than_the_rows_of_any_model(names) -> None:
    for library in BOTH:
        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        model = library.get_peft_model(base, library.LoraConfig(target_modules=["0"], r=2)).eval()
        with pytest.raises(ValueError, match=f"{len(names)} (names for|and) 9"):
            model(torch.ones(9, 4), adapter_names=names)
        model(torch.ones(len(names), 4), adapter_names=names)


def test_layers_tell_their_sizes_and_parameter() -> None:
    told = []
    for library in BOTH:
        norm = place(tuned(library), "model.norm")
        config = library.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
        experts = library.get_peft_model(bases.mixtral(), config).get_base_model().model.layers[0].mlp.experts
        told.append((norm.in_features, norm.out_features, experts.parameter_name))
    assert told[0] == told[1] == (None, None, "down_proj")


def test_a_merged_adapter_serves_alone_on_every_layer(tmp_path) -> None:
    """In HF PEFT the active one goes on serving the layers that the merged one does not sit on."""
    saved = {}
    for name, target in (("a", "q_proj"), ("b", "v_proj")):
        config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        saved[name] = peft.get_peft_model(bases.llama(), config)
        saved[name].save_pretrained(tmp_path / name)
    outputs = []
    for library in BOTH:
        model = library.PeftModel.from_pretrained(bases.llama(), tmp_path / "a", adapter_name="a")
        model.load_adapter(tmp_path / "b", adapter_name="b")
        model.eval().merge_adapter(["b"])
        assert model.active_adapters == ["a"]
        outputs.append(model(input_ids=IDS).logits)
    alone = saved["b"].eval()(input_ids=IDS).logits
    torch.testing.assert_close(outputs[1], alone, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    model.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(outputs[0], model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    assert (outputs[0] - alone).abs().max() > 1e-2
