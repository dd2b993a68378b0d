"""What programs written for HF PEFT do beyond the examples of its documentation, with HF PEFT as the oracle."""

from __future__ import annotations

import copy
import json
import pickle
from typing import ClassVar

import huggingface_hub
import peft
import pytest
import torch
from peft.helpers import KappaTuneSelector as TheirSelector
from peft.helpers import find_kappa_target_modules as their_kappas
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.pytorch_utils import Conv1D

import peft_dist
from peft_dist.catalog import METHODS, config_class
from peft_dist.fused.scaled import _zeros_and_ones
from peft_dist.fused.turned import _above, _places
from tests.contract import bases
from tests.contract.test_fields import base_values, made
from tests.peft_dist.test_merge import disturb

IDS = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(5))
TARGETS = {"target_modules": ["q_proj"], "r": 2}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in METHODS if name != "XLORA"])
def test_a_model_that_answered_in_inference_mode_trains(name) -> None:
    values = base_values(name)
    if name == "OFT":
        values |= {"oft_block_size": 8}
    for kept in (_places, _above, _zeros_and_ones):
        kept.cache_clear()
    model = made(name, **values)
    more = (
        {"task_ids": torch.zeros(2, dtype=torch.long)} if name in ("POLY", "MULTITASK_PROMPT_TUNING") else {}
    )
    model.eval()
    with torch.inference_mode():
        model(input_ids=IDS, **more)
    model.train()
    model(input_ids=IDS, labels=IDS, **more).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads and any(g is not None and g.abs().sum() > 0 for g in grads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("random", [False, True], ids=["as it starts", "at random"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "XLORA"])
def test_a_model_is_pickled_whole(name, random) -> None:
    """torch.save of a model, or a process that is spawned with it."""
    values = base_values(name)
    switch = "init_lora_weights" if name == "LORA" else "init_weights"
    if random and (config_class(name).is_prompt_learning or not hasattr(config_class(name), switch)):
        pytest.skip("it starts in one way")
    model = made(name, **values, **({switch: False} if random else {})).eval()
    more = (
        {"task_ids": torch.zeros(2, dtype=torch.long)} if name in ("POLY", "MULTITASK_PROMPT_TUNING") else {}
    )
    copied = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(copied(input_ids=IDS, **more).logits, model(input_ids=IDS, **more).logits)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in copied.named_parameters() if p.requires_grad] == trained


def test_the_type_in_a_file_decides_whichever_class_is_asked(tmp_path) -> None:
    peft.LoraConfig(r=3, target_modules=["q_proj"]).save_pretrained(tmp_path)
    theirs = peft.IA3Config.from_pretrained(tmp_path)
    mine = peft_dist.IA3Config.from_pretrained(tmp_path)
    assert type(mine).__name__ == type(theirs).__name__ == "LoraConfig" and mine.r == theirs.r == 3
    (tmp_path / "adapter_config.json").write_text(json.dumps({"foo": 3}))
    for config in (peft.LoraConfig, peft_dist.LoraConfig):
        with pytest.raises(TypeError, match="peft_type"):
            config.from_pretrained(tmp_path)


def test_what_the_hub_is_told_reaches_it(tmp_path, monkeypatch) -> None:
    saved = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**TARGETS))
    saved.save_pretrained(tmp_path / "there")
    told = []

    def fetched(repository, **how):
        told.append(how)
        return str(tmp_path / "there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    options = {"cache_dir": str(tmp_path), "local_files_only": True, "force_download": False}
    model = peft_dist.PeftModel.from_pretrained(bases.llama(), "some/adapter", use_auth_token="t", **options)
    model.load_adapter("some/adapter", "other", **options)
    assert [{key: how[key] for key in options} for how in told] == [options, options]
    assert [how["token"] for how in told] == ["t", None]
    with pytest.raises(TypeError, match="unknown arguments: cash_dir"):
        model.load_adapter("some/adapter", "third", cash_dir="x")
    assert set(model.peft_config) == {"default", "other"}


def test_where_layers_are_is_no_question_of_an_adapters(tmp_path) -> None:
    for library in (peft, peft_dist):
        library.get_peft_model(bases.llama(), library.LoraConfig(**TARGETS)).save_pretrained(tmp_path)
        model = library.PeftModel.from_pretrained(bases.llama(), tmp_path, device_map={"": "cpu"})
        model.load_adapter(tmp_path, "other", device_map="auto", max_memory={"cpu": "1GB"})
        assert set(model.peft_config) == {"default", "other"}
    with pytest.raises(peft_dist.PeftDistError, match="pickle"):
        peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path, use_safetensors=False)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_leaves_what_is_trained_and_follows_is_trainable(tmp_path, is_trainable) -> None:
    trained = []
    for library in (peft, peft_dist):
        config = library.LoraConfig(**TARGETS, modules_to_save=["lm_head"])
        library.get_peft_model(bases.llama(), config).save_pretrained(tmp_path)
        model = library.get_peft_model(bases.llama(), config)
        inner = model.get_base_model().model
        inner.norm.weight.requires_grad_(True)
        inner.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
        model.load_adapter(tmp_path, "other", is_trainable=is_trainable)
        model.add_adapter("added", copy.deepcopy(config))
        trained.append({n for n, p in model.named_parameters() if p.requires_grad})
    assert trained[0] == trained[1] and any("norm" in name for name in trained[1])
    assert any(".other" in name for name in trained[1]) == is_trainable


def test_whether_any_adapter_serves() -> None:
    for library in (peft, peft_dist):
        model = library.get_peft_model(bases.llama(), library.LoraConfig(**TARGETS))
        assert model.has_active_enabled_adapter
        with model.disable_adapter():
            assert not model.has_active_enabled_adapter
            with model.disable_adapter():
                assert not model.has_active_enabled_adapter
            assert not model.has_active_enabled_adapter
        assert model.has_active_enabled_adapter


@pytest.mark.filterwarnings("ignore")
def test_hubs_find_the_same_facts_in_a_card(tmp_path) -> None:
    cards = []
    for library in (peft, peft_dist):
        base = bases.llama()
        base.config._name_or_path = base.name_or_path = "some/base"
        base.add_model_tags(["mine"])
        model = library.get_peft_model(base, library.LoraConfig(**TARGETS, task_type="CAUSAL_LM"))
        folder = tmp_path / library.__name__
        folder.mkdir()
        (folder / "README.md").write_text("---\nlicense: mit\n---\nA text of my own\n")
        model.save_pretrained(folder)
        cards.append(huggingface_hub.ModelCard.load(folder / "README.md"))
    theirs, mine = cards
    assert set(mine.data.tags) == set(theirs.data.tags)
    for key in ("library_name", "pipeline_tag", "base_model", "license"):
        assert mine.data.to_dict()[key] == theirs.data.to_dict()[key]
    assert mine.text.strip() == "A text of my own"


def test_tensors_of_another_shape_may_be_left_out(tmp_path) -> None:
    class Net(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.emb, self.lin = nn.Embedding(size, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.lin(self.emb(x))

    for library in (peft, peft_dist):
        config = library.LoraConfig(r=2, target_modules=["emb", "lin"])
        model = library.get_peft_model(Net(10), config)
        disturb(model)
        model.save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="10"):
            library.PeftModel.from_pretrained(Net(12), tmp_path)
        with pytest.warns(UserWarning, match="lora_embedding_A"):
            other = library.PeftModel.from_pretrained(Net(12), tmp_path, ignore_mismatched_sizes=True)
        torch.testing.assert_close(
            other.base_model.model.lin.lora_B["default"].weight,
            model.base_model.model.lin.lora_B["default"].weight,
        )


def test_layers_are_chosen_by_their_condition() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 16))
            self.down_proj = nn.Parameter(torch.randn(3, 16, 8))

    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Experts(), "lins": nn.ModuleList([nn.Linear(8, 5) for _ in range(4)])})
    from peft_dist.helpers import KappaTuneSelector, find_kappa_target_modules

    for share in (0.2, 0.5, 1.0):
        assert find_kappa_target_modules(model, share) == their_kappas(model, share, show_progress=False)
    lone = nn.ModuleDict({"a": nn.Linear(4, 4)})
    assert find_kappa_target_modules(lone) == their_kappas(lone, show_progress=False)
    for how in ({"num_modules": 2}, {"threshold": 4.0}, {}):
        mine, theirs = (
            KappaTuneSelector(model, show_progress=False),
            TheirSelector(model, show_progress=False),
        )
        assert mine.get_best_targets(**how) == theirs.get_best_targets(**how)
        assert mine.get_best_target_parameters(**how) == theirs.get_best_target_parameters(**how)


def test_functions_within_an_empty_init_may_make_modules_with_memory() -> None:
    from peft_dist.utils.integrations import init_empty_weights, skip_init_on_device

    def make() -> nn.Module:
        return nn.Linear(2, 2)

    with init_empty_weights():
        assert make().weight.is_meta and not skip_init_on_device(make)().weight.is_meta
        assert make().weight.is_meta
    assert not skip_init_on_device(make)().weight.is_meta


def test_dora_may_be_told_to_keep_its_weights() -> None:
    from peft_dist.helpers import DoraCaching

    model = made("LORA", **TARGETS, use_dora=True).eval()
    with torch.no_grad(), DoraCaching():
        inside = model(input_ids=IDS).logits
    DoraCaching()(enabled=False)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, inside)


@pytest.mark.filterwarnings("ignore")
def test_targets_that_a_program_gives_its_own_architecture() -> None:
    for library in (peft, peft_dist):
        other = library.utils.other
        table = other.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        usual = table.pop("llama")
        try:
            with pytest.raises(ValueError):
                library.get_peft_model(bases.llama(), library.LoraConfig(r=2))
            table["llama"] = [*usual[:1], "k_proj"]
            model = library.get_peft_model(bases.llama(), library.LoraConfig(r=2))
            assert model.peft_config["default"].target_modules == {"q_proj", "k_proj"}
        finally:
            table["llama"] = usual


class Layers(nn.Module):
    """A layer of each kind that has sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.hf = nn.Embedding(10, 6), nn.Linear(6, 5), Conv1D(7, 6)
        self.one, self.two = nn.Conv1d(4, 8, 2), nn.Conv2d(4, 8, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "targets"), [("LORA", "emb|lin|hf|one|two"), ("LOHA", "lin|two"), ("BOFT", "two")]
)
def test_layers_say_what_goes_in_and_comes_out(name, targets) -> None:
    more = {"boft_block_size": 4} if name == "BOFT" else {"r": 2}
    sizes = []
    for library in (peft, peft_dist):
        cls = library.PEFT_TYPE_TO_CONFIG_MAPPING[library.PeftType(name)]
        model = library.get_peft_model(Layers(), cls(target_modules=targets, **more)).get_base_model()
        layers = [getattr(model, key) for key in targets.split("|")]
        sizes.append([(layer.in_features, layer.out_features) for layer in layers])
    assert sizes[0] == sizes[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ADALORA", "FOURIERFT", "WAVEFT", "SHIRA", "OSF", "DELORA", "LORA"])
def test_layers_name_what_they_train(name) -> None:
    layer = made(name, **base_values(name)).get_base_model().model.layers[0].self_attn.q_proj
    trained, kept = layer.adapter_layer_names, layer.other_param_names
    assert not set(trained) & set(kept) and any("default" in getattr(layer, key) for key in trained)
    for names, wanted in ((trained, True), (kept, False)):
        for held in (getattr(layer, key) for key in names):
            tensors = _tensors(held["default"]) if "default" in held else []
            assert all(t.requires_grad == wanted for t in tensors)


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, nn.Module):
        return list(value.parameters())
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.filterwarnings("ignore")
def test_a_weight_read_past_a_module_that_is_trained_whole_is_the_active_adapters() -> None:
    for library in (peft, peft_dist):
        config = library.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
        model = library.get_peft_model(bases.llama(), config)
        model.add_adapter("other", copy.deepcopy(config))
        head = model.get_base_model().lm_head
        assert head.weight is head.modules_to_save["default"].weight
        model.set_adapter("other")
        assert head.weight is head.modules_to_save["other"].weight
        assert head.out_features == head.original_module.out_features
        with model.disable_adapter():
            assert head.weight is head.original_module.weight
        with pytest.raises(AttributeError):
            _ = head.nothing


@pytest.mark.parametrize("held", [nn.ModuleList, lambda m: nn.ModuleDict({"a": m[0]})])
def test_containers_that_are_never_called_are_not_trained_whole(held) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.parts = nn.Linear(3, 3), held([nn.Linear(3, 3)])

    for library in (peft, peft_dist):
        with pytest.raises(TypeError, match="modules_to_save"):
            library.get_peft_model(
                Net(), library.LoraConfig(r=2, target_modules=["lin"], modules_to_save=["parts"])
            )


def test_excluding_nothing_is_said() -> None:
    for library in (peft, peft_dist):
        with pytest.warns(
            library.PeftWarning if library is peft_dist else UserWarning, match="exclude_modules"
        ):
            library.get_peft_model(
                bases.llama(), library.LoraConfig(**TARGETS, exclude_modules=["no_such_layer"])
            )


def test_an_empty_layers_pattern_is_none() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whatever = nn.ModuleList([nn.ModuleDict({"baz": nn.Linear(3, 3)}) for _ in range(3)])

    for library in (peft, peft_dist):
        base = nn.ModuleDict({"foo": Net()})
        config = library.LoraConfig(r=2, target_modules=["baz"], layers_to_transform=[1], layers_pattern="")
        model = library.get_peft_model(base, config)
        assert model.targeted_module_names == ["foo.whatever.1.baz"]


def test_trained_tokens_beside_an_adapter_have_a_status() -> None:
    told = []
    for library in (peft, peft_dist):
        config = library.LoraConfig(**TARGETS, trainable_token_indices=[1, 2])
        model = library.get_peft_model(bases.llama(), config)
        rows = [each for each in model.get_layer_status() if "token" in each.name]
        told.append(
            (
                [(r.name, r.module_type, r.requires_grad) for r in rows],
                model.get_model_status().num_adapter_layers,
            )
        )
    assert told[0] == told[1] and len(told[1][0]) == 1


def test_several_adapters_of_a_mixed_model_are_deleted_together_or_not_at_all() -> None:
    for library in (peft, peft_dist):
        model = library.get_peft_model(bases.llama(), library.LoraConfig(**TARGETS), "a", mixed=True)
        model.add_adapter("b", library.LoHaConfig(r=2, target_modules=["k_proj"]))
        model.base_model.merge_adapter(adapter_names=["b"])
        with pytest.raises(ValueError, match="merged"):
            model.delete_adapter(["a", "b"])
        assert set(model.peft_config) == {"a", "b"}
        model.base_model.unmerge_adapter()
        model.delete_adapter(["a", "b"])
        assert not model.peft_config


def test_an_adapter_without_memory_has_a_state_dictionary() -> None:
    states = []
    for library in (peft, peft_dist):
        model = library.inject_adapter_in_model(
            library.LoraConfig(**TARGETS), bases.llama(), low_cpu_mem_usage=True
        )
        state = library.get_peft_model_state_dict(model)
        states.append({key: (tuple(t.shape), t.is_meta) for key, t in state.items()})
        filled = {key: torch.ones(t.shape) for key, t in state.items()}
        library.set_peft_model_state_dict(model, filled, low_cpu_mem_usage=True)
        assert not any(p.is_meta for p in model.parameters())
    assert states[0] == states[1] and all(meta for _, meta in states[1].values())


def test_a_bases_config_may_be_a_dictionary() -> None:
    from peft_dist.tuners.tuners_utils import BaseTuner

    class Net(nn.Module):
        config: ClassVar = {"model_type": "mine", "width": 3}

    assert BaseTuner.get_model_config(Net()) == Net.config


def test_names_that_a_base_lacks_are_torchs_own_error() -> None:
    for library in (peft, peft_dist):
        model = library.get_peft_model(bases.llama(), library.LoraConfig(**TARGETS))
        state = library.get_base_model_state_dict(model)
        with pytest.raises(RuntimeError, match="nothing"):
            library.set_base_model_state_dict(model, {**state, "nothing": torch.ones(1)}, strict=True)


class Normed(nn.Module):
    """A head that keeps running means."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.head = nn.Linear(5, 6), nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))

    def forward(self, x):
        return self.head(self.lin(x))


@pytest.mark.filterwarnings("ignore")
def test_running_means_of_modules_trained_whole_are_the_adapters_own(tmp_path) -> None:
    x, told = 3 * torch.randn(8, 5) + 1, []
    for library in (peft, peft_dist):
        config = library.LoraConfig(r=2, target_modules=["lin"], modules_to_save=["head"])
        model = library.get_peft_model(Normed(), config)
        model.add_adapter("other", copy.deepcopy(config))
        base = model.get_base_model().head.original_module
        with torch.no_grad():
            for _ in range(3):
                model(x)
        model.eval()
        answer = model(x)
        told.append(answer)
        assert torch.equal(base[0].running_mean, torch.zeros(6)) and base[0].num_batches_tracked == 0
        model.set_adapter("other")
        assert not torch.allclose(model(x), answer)
        model.set_adapter("default")
        model.save_pretrained(tmp_path / library.__name__)
        for other in (peft, peft_dist):
            again = other.PeftModel.from_pretrained(Normed(), tmp_path / library.__name__).eval()
            torch.testing.assert_close(again(x), answer)
        torch.testing.assert_close(model.merge_and_unload()(x), answer)
    torch.testing.assert_close(told[1], told[0])
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "peft_dist")]
    assert {k: (t.shape, t.dtype) for k, t in files[0].items()} == {
        k: (t.shape, t.dtype) for k, t in files[1].items()
    }


@pytest.mark.filterwarnings("ignore")
def test_what_a_program_disabled_stays_so() -> None:
    after = []
    for library in (peft, peft_dist):
        model = library.get_peft_model(
            bases.llama(), library.LoraConfig(r=2, target_modules=["q_proj", "k_proj"])
        )
        attention = model.get_base_model().model.layers[0].self_attn
        attention.q_proj.enable_adapters(False)
        with model.disable_adapter():
            assert attention.k_proj.disable_adapters
        after.append((attention.q_proj.disable_adapters, attention.k_proj.disable_adapters))
    assert after == [(False, False), (True, False)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("LN_TUNING", {"target_modules": ["input_layernorm"]}),
        ("TRAINABLE_TOKENS", {"token_indices": [1, 2], "target_modules": ["embed_tokens"]}),
    ],
)
def test_two_that_stand_in_one_place_are_not_active_together(name, values) -> None:
    for library in (peft, peft_dist):
        config = library.PEFT_TYPE_TO_CONFIG_MAPPING[library.PeftType(name)]
        model = library.get_peft_model(bases.llama(), config(**values))
        model.add_adapter("other", config(**values))
        if library is peft:
            model.base_model.set_adapter(["default", "other"])
            continue
        with pytest.raises(peft_dist.PeftDistError, match="Activate one"):
            model.base_model.set_adapter(["default", "other"])
        assert model.active_adapters == ["default"]


@pytest.mark.filterwarnings("ignore")
def test_a_name_used_twice_on_a_bare_base() -> None:
    for library in (peft, peft_dist):
        config = library.LoraConfig(**TARGETS, init_lora_weights=False)
        base = library.inject_adapter_in_model(config, bases.llama())
        A = base.model.layers[0].self_attn.q_proj.lora_A["default"].weight.clone()
        if library is peft:
            library.inject_adapter_in_model(config, base)
            assert not torch.equal(base.model.layers[0].self_attn.q_proj.lora_A["default"].weight, A)
            continue
        with pytest.raises(ValueError, match="has one of this name"):
            library.inject_adapter_in_model(config, base)
        assert torch.equal(base.model.layers[0].self_attn.q_proj.lora_A["default"].weight, A)


def test_the_status_of_adapted_blocks() -> None:
    values = {"adapter_layers": 1, "adapter_len": 2, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(bases.llama(), peft.AdaptionPromptConfig(**values))
    with pytest.raises(TypeError):
        theirs.get_layer_status()
    mine = peft_dist.get_peft_model(bases.llama(), peft_dist.AdaptionPromptConfig(**values))
    assert [each.available_adapters for each in mine.get_layer_status()] == [["default"]]
    assert mine.get_model_status().num_adapter_layers == 1


def test_looking_at_every_attribute_of_a_model_meets_no_error_but_that_it_is_not_there() -> None:
    net = nn.ModuleDict({"lin": nn.Linear(4, 4)})
    model = peft_dist.get_peft_model(net, peft_dist.LoraConfig(r=2, target_modules=["lin"]))
    for thing in (model, model.base_model, net["lin"]):
        for name in dir(thing):
            getattr(thing, name, None)
    assert not hasattr(model, "word_embeddings")
    with pytest.raises(ValueError, match="no input embeddings"):
        model.add_adapter("p", peft_dist.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_a_bias_that_cannot_be_merged_is_warned_of() -> None:
    for library in (peft, peft_dist):
        with pytest.warns(library.PeftWarning, match="bias"):
            library.get_peft_model(
                nn.ModuleDict({"lin": nn.Linear(4, 4, bias=False)}),
                library.LoraConfig(r=2, target_modules=["lin"], lora_bias=True),
            )


def test_embeddings_that_a_base_does_not_tell_are_not_left_out_in_silence(tmp_path) -> None:
    for library in (peft, peft_dist):
        base = nn.ModuleDict({"emb": nn.Embedding(8, 4), "lin": nn.Linear(4, 4)})
        model = library.get_peft_model(base, library.LoraConfig(r=2, target_modules=["emb", "lin"]))
        with pytest.warns(UserWarning, match="embedding"):
            model.save_pretrained(tmp_path, save_embedding_layers=True)
        assert not any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("peft_type", "values"),
    [
        ("LORA", {**TARGETS, "init_lora_weights": False}),
        ("LORA", {**TARGETS, "init_lora_weights": False, "lora_bias": True}),
        ("LN_TUNING", {"base": "gpt2", "target_modules": ["ln_f"]}),
    ],
    ids=["lora", "lora with a bias", "layer norms"],
)
def test_a_model_within_fully_sharded_data_parallel_has_the_names_of_its_own(peft_type, values) -> None:
    """As far as one process shows it: names and values, and a forward on tensors that are no Parameters then. It
    takes weights and biases off their modules and hangs its own there."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = made(peft_type, **values).eval()
        wanted = model(input_ids=IDS).logits.detach()
        state = {key: t.clone() for key, t in peft_dist.get_peft_model_state_dict(model).items()}
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        with torch.no_grad():
            torch.testing.assert_close(wrapped(input_ids=IDS).logits, wanted)
        found = peft_dist.get_peft_model_state_dict(wrapped)
    finally:
        torch.distributed.destroy_process_group()
    assert found.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(found[key], value)
