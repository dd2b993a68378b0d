"""Adapters on disk: HF PEFT reads what is written here and the other way round; damage is refused in
words."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import ClassVar

import fsspec
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import peft_dist
from peft_dist import PeftModel, checkpoint, get_peft_model, inject_adapter_in_model
from peft_dist.checkpoint import CARD_NAME, CONFIG_NAME, PICKLED_NAME, WEIGHTS_NAME
from peft_dist.errors import AdapterError, CheckpointError
from peft_dist.methods.activation.ia3 import IA3Config
from peft_dist.methods.prompt.prompt_tuning import PromptTuningConfig
from peft_dist.methods.weight.lora import LoraConfig
from tests.contract import bases
from tests.peft_dist.test_merge import disturb, llama, logits

LLAMA = {
    "LORA": LoraConfig(
        r=3, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "LORA on embeddings": LoraConfig(r=3, target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"),
    "LORA with biases": LoraConfig(r=3, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"),
    "LORA with its own biases": LoraConfig(
        r=3, target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM"
    ),
    "IA3": IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "PROMPT_TUNING": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


BASES = {name: (llama, config) for name, config in LLAMA.items()} | {
    "GPT-2": (gpt2, LoraConfig(r=2, target_modules=["c_attn", "wte"], bias="all", task_type="CAUSAL_LM")),
    "BERT": (bert, LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")),
}


def adapted(name: str = "LORA", adapter: str = "default") -> PeftModel:
    base, config = BASES[name]
    model = get_peft_model(base(), copy.deepcopy(config), adapter)
    disturb(model, adapter)
    return model.eval()


def refusal(call: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BASES)
def test_hf_peft_loads_what_we_save(name: str, tmp_path: Path) -> None:
    ours = adapted(name)
    checkpoint.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(BASES[name][0](), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-6)
    saved, expected = load_file(tmp_path / WEIGHTS_NAME), peft.get_peft_model_state_dict(theirs)
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[key], expected[key]) for key in saved)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BASES)
def test_we_load_what_hf_peft_saves(name: str, tmp_path: Path) -> None:
    base, config = BASES[name]
    torch.manual_seed(1)
    their_class = getattr(peft, type(config).__name__)
    fields = {
        key: value for key, value in config.to_dict().items() if key in their_class.__dataclass_fields__
    }
    theirs = peft.get_peft_model(base(), their_class(**fields))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.eval().save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BASES)
def test_a_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    expected, tensors = logits(model), checkpoint.state_dict(model)
    checkpoint.save(model, tmp_path)
    saved = checkpoint.read(tmp_path)
    assert set(saved.tensors) == set(tensors)
    assert all(torch.equal(saved.tensors[key], tensors[key]) for key in tensors)
    assert saved.config.inference_mode and not model.peft_config["default"].inference_mode
    for parameter in checkpoint.adapter_parameters(model, "default").values():
        parameter.data.zero_()
    result = checkpoint.load_state_dict(model, saved.tensors)
    assert result == checkpoint.LoadResult([], [])
    assert torch.equal(logits(model), expected)


def test_the_directory_is_complete_and_nothing_else(tmp_path: Path) -> None:
    model = adapted()
    checkpoint.save(model, tmp_path / "deep" / "adapter")
    assert {p.name for p in (tmp_path / "deep" / "adapter").iterdir()} == {
        WEIGHTS_NAME,
        CONFIG_NAME,
        CARD_NAME,
    }
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["adapter"]
    card = (tmp_path / "deep" / "adapter" / CARD_NAME).read_text()
    assert card.startswith(
        "---\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n- transformers\n---\n"
    )
    config = json.loads((tmp_path / "deep" / "adapter" / CONFIG_NAME).read_text())
    assert config["peft_type"] == "LORA" and config["inference_mode"] is True


def test_saving_again_replaces_all_but_the_card(tmp_path: Path) -> None:
    model = adapted()
    checkpoint.save(model, tmp_path)
    (tmp_path / CARD_NAME).write_text("---\nlicense: mit\ntags:\n- mine\n---\nmine")
    (tmp_path / PICKLED_NAME).write_text("an older adapter")
    disturb(model, seed=9)
    checkpoint.save(model, tmp_path)
    card = (tmp_path / CARD_NAME).read_text()
    assert card.endswith("---\nmine") and "license: mit\n" in card and "library_name: peft\n" in card
    assert "- mine\n" in card and "- lora\n" in card
    assert not (tmp_path / PICKLED_NAME).exists()
    expected = checkpoint.state_dict(model)
    assert all(torch.equal(value, expected[key]) for key, value in load_file(tmp_path / WEIGHTS_NAME).items())


def test_adapters_with_other_names_have_folders_of_their_own(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("second", IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    disturb(model, "second")
    checkpoint.save(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, "second"}
    second = checkpoint.read(tmp_path, subfolder="second")
    assert second.config.peft_type == "IA3" and checkpoint.read_config(tmp_path).peft_type == "LORA"
    assert all(key.endswith("ia3_l") for key in second.tensors)
    checkpoint.save(model, tmp_path / "one", ["second"])
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["second"]
    with pytest.raises(
        AdapterError, match=r"there is no adapter 'secnd'; there are: default, second\. Closest"
    ):
        checkpoint.save(model, tmp_path / "none", ["secnd"])
    assert not (tmp_path / "none").exists()


def test_urls_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory = fsspec.filesystem("memory")
    model = adapted()
    try:
        checkpoint.save(model, "memory://adapters/one")
        assert {name.rpartition("/")[2] for name in memory.ls("/adapters/one", detail=False)} == {
            WEIGHTS_NAME,
            CONFIG_NAME,
            CARD_NAME,
        }
        tensors = checkpoint.read("memory://adapters/one").tensors
        expected = checkpoint.state_dict(model)
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
        disturb(model, seed=9)
        checkpoint.save(model, "memory://adapters/one")
        again = checkpoint.read("memory://adapters/one").tensors
        expected = checkpoint.state_dict(model)
        assert all(torch.equal(again[key], expected[key]) for key in expected)
    finally:
        memory.rm("/adapters", recursive=True)
    assert refusal(checkpoint.read, "memory://adapters/one").startswith(
        "adapter: 'memory://adapters/one' does not"
    )


def test_a_process_that_does_not_write_writes_nothing(tmp_path: Path) -> None:
    checkpoint.save(adapted(), tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_a_directory_that_cannot_be_written_is_named_and_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "adapter"
    assert refusal(checkpoint.save, adapted(), target).startswith(
        f"{target}: the adapter cannot be written: "
    )
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    model = adapted()
    monkeypatch.setattr(type(model.peft_config["default"]), "save_pretrained", full)
    target = tmp_path / "new" / "adapter"
    assert refusal(checkpoint.save, model, target) == (
        f"{target}: the adapter cannot be written: [Errno 28] No space left on device"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(adapted(), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("kept", [5, 200, -1])
def test_truncated_weights_are_refused(saved: Path, kept: int) -> None:
    file = saved / WEIGHTS_NAME
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    message = refusal(checkpoint.read, saved)
    if kept == -1:
        assert message == (
            f"adapter '{saved}': {file}: has {len(whole) - 1} bytes, its header says {len(whole)}. "
            "It was cut short: copy it again."
        )
    else:
        assert message == (
            f"adapter '{saved}': {file}: not a safetensors file, or cut short ({kept} bytes). Copy it again."
        )


def test_pickled_weights_are_refused(saved: Path) -> None:
    (saved / WEIGHTS_NAME).rename(saved / PICKLED_NAME)
    assert refusal(checkpoint.read, saved) == (
        f"'{saved}' has its weights in adapter_model.bin, which runs code when it is read; only "
        "adapter_model.safetensors is loaded. Convert it where you trust it: safetensors.torch.save_file("
        "torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')."
    )


def test_what_is_not_there_is_named(saved: Path, tmp_path: Path) -> None:
    (saved / WEIGHTS_NAME).unlink()
    assert refusal(checkpoint.read, saved) == f"'{saved}' has no {WEIGHTS_NAME}."
    (saved / CONFIG_NAME).unlink()
    assert (
        refusal(checkpoint.read, saved)
        == f"'{saved}' has no {CONFIG_NAME}; it is not an adapter's directory."
    )
    assert refusal(checkpoint.read, tmp_path / "nowhere").startswith(
        f"adapter: '{tmp_path}/nowhere' is not a"
    )
    assert refusal(checkpoint.read_config, "nobody/nothing-at-all").startswith(
        "adapter: 'nobody/nothing-at-all' is neither a directory here nor can it be fetched from the hub: "
    )


def rewrite(folder: Path, change: object) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def test_missing_and_unexpected_names_are_told_as_hf_peft_tells_them(saved: Path) -> None:
    gone = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[gone]
        tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(3, 16)

    rewrite(saved, change)
    model = adapted()
    before = checkpoint.adapter_parameters(model, "default")[gone].clone()
    result = checkpoint.load_state_dict(model, checkpoint.read(saved).tensors)
    assert result.missing_keys == ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    assert result.unexpected_keys == ["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"]
    assert torch.equal(checkpoint.adapter_parameters(model, "default")[gone], before)


def test_another_shape_is_refused_and_nothing_is_filled(saved: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=5, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = checkpoint.state_dict(model)
    tensors = checkpoint.read(saved).tensors
    prefix = "base_model.model.model.layers"
    message = (
        "4 of 5 tensors of adapter 'default' have another shape: "
        f"'{prefix}.0.self_attn.q_proj.lora_A.weight' is (3, 16) there and (5, 16) here, "
        f"'{prefix}.0.self_attn.q_proj.lora_B.weight' is (16, 3) there and (16, 5) here, "
        f"'{prefix}.1.self_attn.q_proj.lora_A.weight' is (3, 16) there and (5, 16) here."
    )
    assert refusal(checkpoint.load_state_dict, model, tensors) == (
        f"{message} Its rank, targets or base differ from this model's."
    )
    with pytest.warns(UserWarning) as caught:
        checkpoint.load_state_dict(model, tensors, ignore_mismatched_sizes=True)
    assert str(caught[0].message) == f"{message} They keep their values."
    after = checkpoint.state_dict(model)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_adapter_of_another_base_is_refused(saved: Path) -> None:
    model = get_peft_model(gpt2(), LoraConfig(r=3, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    assert refusal(checkpoint.load_state_dict, model, checkpoint.read(saved).tensors) == (
        "none of the 9 tensors belongs to adapter 'default', whose first is "
        "'base_model.model.transformer.h.0.attn.c_attn.lora_A.weight'. "
        "Was it trained on another base, or with other target_modules?"
    )


def test_names_are_mapped(saved: Path) -> None:
    tensors = checkpoint.read(saved, key_mapping={r"^model\.layers": "model.language_model.layers"}).tensors
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert "base_model.model.lm_head.weight" in tensors


def test_tensors_on_meta_are_given_memory_when_loaded_and_refused_when_saved(saved: Path) -> None:
    expected = logits(adapted())
    model = get_peft_model(llama(), copy.deepcopy(LLAMA["LORA"]), low_cpu_mem_usage=True).eval()
    assert refusal(checkpoint.state_dict, model) == (
        "'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' is on the meta device and has no "
        "values. Load or start the adapter first."
    )
    checkpoint.load_state_dict(model, checkpoint.read(saved).tensors)
    assert torch.equal(logits(model), expected)


def test_tensors_that_others_gathered_are_taken_and_must_be_whole() -> None:
    model = adapted()
    whole = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    taken, own = checkpoint.state_dict(model, whole_model=whole), checkpoint.state_dict(model)
    assert taken.keys() == own.keys() and all(torch.equal(taken[key], own[key] + 1) for key in own)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    whole[name] = torch.empty(0)
    assert refusal(checkpoint.state_dict, model, whole_model=whole) == (
        f"'{name}' and 0 more tensors of adapter 'default' are empty: they rest sharded elsewhere. "
        "Gather them before saving."
    )
    del whole[name]
    assert refusal(checkpoint.state_dict, model, whole_model=whole) == (
        f"the whole model lacks '{name}' of adapter 'default'. Pass the whole one."
    )


def test_embeddings_travel_where_they_were_resized_or_asked_for(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    both = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert not both & set(checkpoint.state_dict(model))
    assert both <= set(checkpoint.state_dict(model, save_embedding_layers=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.resize_token_embeddings(40)
    assert both <= set(checkpoint.state_dict(model))
    assert not both & set(checkpoint.state_dict(model, save_embedding_layers=False))
    checkpoint.save(model, tmp_path / "adapter")
    other = llama()
    other.resize_token_embeddings(40)
    loaded = get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    checkpoint.load_state_dict(loaded, checkpoint.read(tmp_path / "adapter").tensors)
    assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_injected_without_a_class_around_it_is_read_and_filled() -> None:
    model = inject_adapter_in_model(copy.deepcopy(LLAMA["LORA"]), llama()).eval()
    disturb(model)
    tensors = checkpoint.state_dict(model)
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in tensors and "lm_head.weight" in tensors
    expected = logits(model)
    for parameter in checkpoint.adapter_parameters(model, "default").values():
        parameter.data.zero_()
    checkpoint.load_state_dict(model, tensors)
    assert torch.equal(logits(model), expected)


def test_a_copied_directory_loads(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    assert checkpoint.read(tmp_path / "copy").tensors.keys() == checkpoint.read(saved).tensors.keys()


def test_a_bias_that_hf_peft_writes_three_times_is_read_once(tmp_path: Path) -> None:
    """With `bias: all` and a head of its own HF PEFT saves the head's bias under three names."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {"r": 2, "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}
    config = BertConfig(vocab_size=32, num_labels=3, **sizes)
    base = BertForSequenceClassification(config)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**values)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p)) if p.requires_grad else None
    theirs.save_pretrained(tmp_path)
    assert sum("classifier" in key for key in load_file(tmp_path / "adapter_model.safetensors")) == 4
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ids = torch.arange(1, 9).view(2, 4)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_adapters_of_layers_that_had_other_names(tmp_path) -> None:
    """As Qwen2-VL's were called before transformers put `model.` before its parts; HF PEFT warns and leaves them."""
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    facts = Qwen2VLConfig(text_config={**bases.LLAMA, "rope_parameters": rope}, vision_config=vision)
    base = Qwen2VLForConditionalGeneration(facts)
    config = peft_dist.LoraConfig(r=2, target_modules=["q_proj", "qkv"], init_lora_weights=False)
    saved = peft_dist.get_peft_model(copy.deepcopy(base), config)
    saved.save_pretrained(tmp_path)
    wanted = load_file(tmp_path / WEIGHTS_NAME)
    before = {
        key.replace(".model.language_model.", ".model.").replace(
            ".model.model.visual.", ".model.visual."
        ): tensor
        for key, tensor in wanted.items()
    }
    assert not before.keys() & wanted.keys()
    save_file(before, tmp_path / WEIGHTS_NAME)
    for library in (peft_dist, peft):
        loaded = library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        state = library.get_peft_model_state_dict(loaded)
        found = {key for key in wanted if torch.equal(state[key], wanted[key])}
        assert found == (wanted.keys() if library is peft_dist else set())
    again = peft_dist.get_peft_model(copy.deepcopy(base), config)
    assert not any(again.load_adapter(tmp_path, "other"))
    lost = {key.replace("qkv", "kqv"): tensor for key, tensor in before.items()}
    save_file(lost, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="qkv"):
        peft_dist.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_a_model_may_say_how_its_layers_were_called(tmp_path) -> None:
    class Base(nn.Module):
        _checkpoint_conversion_mapping: ClassVar = {r"^first\.": "inner.first."}

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})

    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(4, 4), nn.ModuleDict({"second": nn.Linear(4, 4)})

    config = peft_dist.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    saved = peft_dist.get_peft_model(Before(), config)
    saved.save_pretrained(tmp_path)
    loaded = peft_dist.PeftModel.from_pretrained(Base(), tmp_path).get_base_model()
    assert torch.equal(loaded.inner["first"].lora_A["default"].weight, saved.first.lora_A["default"].weight)
    plain = Base()
    plain._checkpoint_conversion_mapping = {}
    with pytest.raises(CheckpointError, match=r"first\.lora_A"):
        peft_dist.PeftModel.from_pretrained(plain, tmp_path)
