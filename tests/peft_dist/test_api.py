"""HF PEFT's model-level API: what `get_peft_model` does beside, loading by a config alone, hot swap, functions."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import types
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

import peft_dist
from peft_dist import functional, hotswap, scaling, signatures
from peft_dist.auto import AutoPeftModel, check_import_allowlist
from peft_dist.errors import AdapterError, CheckpointError, ConfigError, TargetError, TaskError
from tests.contract import bases

IDS = torch.arange(1, 8).view(1, 7)
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


def lora(**more):
    return peft_dist.LoraConfig(**{**LORA, **more})


def disturb(model, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)


@pytest.fixture
def saved_base(tmp_path):
    bases.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# get_peft_model


def said(library, base, adapter_name="default", revision=None, **values) -> tuple[list[str], dict]:
    """What it warns of, and the config afterwards."""
    config = library.LoraConfig(**{**LORA, **values})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", FutureWarning)
        library.get_peft_model(base, config, adapter_name=adapter_name, revision=revision)
    kept = {key: getattr(config, key) for key in ("base_model_name_or_path", "revision", "inference_mode")}
    return [str(w.message) for w in caught], kept


@pytest.mark.parametrize(
    ("num", "case"),
    [
        (0, {}),
        (1, {"base_model_name_or_path": "elsewhere"}),
        (0, {"revision": "v1"}),
        (1, {"adapter_name": "lora"}),
        (0, {"inference_mode": True}),
    ],
)
def test_what_it_does_beside_is_theirs(num, case) -> None:
    mine, other = said(peft_dist, bases.llama(), **case), said(peft, bases.llama(), **case)
    assert len(mine[0]) == len(other[0]) == num
    assert mine[1] == other[1]


def test_a_stored_base_is_named(saved_base) -> None:
    for library in (peft_dist, peft):
        base = LlamaForCausalLM.from_pretrained(saved_base)
        assert said(library, base)[1]["base_model_name_or_path"] == str(saved_base)
        base = LlamaForCausalLM.from_pretrained(saved_base)
        messages, kept = said(library, base, base_model_name_or_path="elsewhere")
        assert kept["base_model_name_or_path"] == str(saved_base)
        assert len(messages) == 1 and f"renamed from 'elsewhere' to '{saved_base}'" in messages[0]


def test_a_revision_is_recorded_and_a_change_of_it_warned_of() -> None:
    for library in (peft_dist, peft):
        config = library.LoraConfig(**LORA)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            library.get_peft_model(bases.llama(), config, revision="v1")
        assert config.revision == "v1"
        with pytest.warns(UserWarning, match="revision"):
            library.get_peft_model(bases.llama(), config, revision="v2")
        assert config.revision == "v2"


def test_a_second_modification_is_warned_of() -> None:
    base = bases.llama()
    model = peft_dist.get_peft_model(base, lora())
    assert model.get_base_model() is base
    with pytest.warns(UserWarning, match=r"second time.*call `.unload\(\)` before"):
        peft_dist.get_peft_model(base, lora(), "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft_dist.get_peft_model(peft_dist.get_peft_model(bases.llama(), lora()).unload(), lora())


def test_a_prompt_needs_a_task() -> None:
    with pytest.raises(KeyError) as raised:
        peft_dist.get_peft_model(bases.llama(), peft_dist.PromptTuningConfig(num_virtual_tokens=2))
    assert isinstance(raised.value, TaskError)
    assert str(raised.value) == (
        "PromptTuningConfig.task_type: a prompt method needs one, such as CAUSAL_LM."
    )


def test_autocast_and_mixed() -> None:
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = peft_dist.get_peft_model(bases.llama().bfloat16(), lora(), autocast_adapter_dtype=autocast)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    model = peft_dist.get_peft_model(bases.llama(), lora(), mixed=True)
    assert type(model) is peft_dist.PeftMixedModel
    model.add_adapter("b", peft_dist.LoHaConfig(r=2, target_modules=["k_proj"]))
    model.set_adapter(["default", "b"])
    model.delete_adapter(["b"])
    assert model.active_adapters == ["default"]


def test_a_config_that_does_not_fit_leaves_the_base() -> None:
    base = bases.llama().train()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    for wrong in (lora(target_modules=["nothing"]), lora(modules_to_save=["nothing"])):
        with pytest.raises(TargetError):
            peft_dist.get_peft_model(base, wrong)
        assert all(p.requires_grad for p in base.parameters()) and base.training
        assert base.state_dict().keys() == state.keys() and not hasattr(base, "peft_config")


# Auto classes


@pytest.mark.parametrize("task", ["CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_auto_classes_find_base_and_adapter(task, saved_base, tmp_path) -> None:
    kind = {"CAUSAL_LM": LlamaForCausalLM, "FEATURE_EXTRACTION": LlamaModel}[task]
    model = peft_dist.get_peft_model(kind.from_pretrained(saved_base), lora(task_type=task))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    name = {"CAUSAL_LM": "CausalLM", "FEATURE_EXTRACTION": "FeatureExtraction"}[task]
    for library in (peft_dist, peft):
        auto = getattr(library, f"AutoPeftModelFor{name}")
        again = auto.from_pretrained(tmp_path / "adapter")
        assert type(again).__name__ == f"PeftModelFor{name}"
        torch.testing.assert_close(again.eval()(IDS)[0], model.eval()(IDS)[0])
    with pytest.raises(ConfigError, match=f"the adapter's task_type is {task}. Use AutoPeftModelFor{name}"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="Use AutoPeftModelFor"):
        peft_dist.AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "adapter")


def test_heads_of_auto_classes(saved_base, tmp_path) -> None:
    base = bases.classifier()
    base.save_pretrained(tmp_path / "classifier")
    base = type(base).from_pretrained(tmp_path / "classifier")
    model = peft_dist.get_peft_model(base, lora(task_type="SEQ_CLS"))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft_dist.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(IDS).logits, model.eval()(IDS).logits)


def test_an_adapter_without_a_task_is_loaded_by_its_auto_mapping(saved_base, tmp_path) -> None:
    model = peft_dist.get_peft_model(LlamaForCausalLM.from_pretrained(saved_base), lora())
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    for library in (peft_dist, peft):
        again = library.AutoPeftModel.from_pretrained(tmp_path / "adapter")
        assert type(again).__name__ == "PeftModel"
        assert type(again.get_base_model()) is LlamaForCausalLM
        torch.testing.assert_close(again.eval()(IDS).logits, model.eval()(IDS).logits)
    config = peft_dist.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.auto_mapping == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    config.auto_mapping = {"base_model_class": "system", "parent_library": "os"}
    config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"wants to import 'os', which is not allowed"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    config.auto_mapping = None
    config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="neither task_type nor auto_mapping"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    config.base_model_name_or_path = None
    config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="base_model_name_or_path is not given"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="AutoPeftModel is not made by its name"):
        AutoPeftModel()
    assert check_import_allowlist(["a"], "a.b") and not check_import_allowlist(["a"], "ab")


# Loading


def test_loading_again_puts_values_in_and_says_what_differs(tmp_path) -> None:
    model = peft_dist.get_peft_model(bases.llama(), lora(task_type="CAUSAL_LM"))
    disturb(model)
    model.save_pretrained(tmp_path)
    want = model(IDS).logits
    disturb(model, 2)
    result = model.load_adapter(tmp_path, "default", is_trainable=True)
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(model(IDS).logits, want)
    assert any(p.requires_grad for p in model.parameters())
    other = peft_dist.get_peft_model(bases.llama(), lora(r=2, task_type="CAUSAL_LM"))
    state = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(AdapterError, match="the model has one of this name with another r: 2, not 4"):
        other.load_adapter(tmp_path, "default")
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    with pytest.raises(AdapterError, match="the model has one of this name"):
        other.add_adapter("default", lora())


BAD = {
    "missing": (lambda t, key: t.pop(key), "the checkpoint lacks 1 tensors, the first 'base_model"),
    "extra": (
        lambda t, key: t.update({key.replace("layers.0", "layers.9"): t[key].clone()}),
        r"has, unknown here, 1 tensors, the first 'base_model.model.model.layers.9",
    ),
    "misshapen": (lambda t, key: t.update({key: torch.zeros(3, 3)}), r"is \(3, 3\) there and \(4, 16\) here"),
    "NaN": (lambda t, key: t[key].fill_(float("nan")), r"q_proj.lora_A.weight' has NaN or infinite values"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_name_the_tensor_and_leave_the_model(case, tmp_path) -> None:
    from safetensors.torch import save_file

    spoil, message = BAD[case]
    model = peft_dist.get_peft_model(bases.llama(), lora(task_type="CAUSAL_LM"))
    disturb(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    spoil(tensors, next(key for key in tensors if "q_proj.lora_A" in key))
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    before = model(IDS).logits
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"] and torch.equal(model(IDS).logits, before)
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(tmp_path, "default")
    base = bases.llama()
    with pytest.raises(CheckpointError, match=message):
        peft_dist.PeftModel.from_pretrained(base, tmp_path)
    assert all(p.requires_grad for p in base.parameters())
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear and not hasattr(base, "peft_config")


def test_an_adapter_of_another_architecture_is_refused(tmp_path) -> None:
    model = peft_dist.get_peft_model(bases.gpt2(), peft_dist.LoraConfig(r=4, target_modules=["c_attn"]))
    model.save_pretrained(tmp_path)
    base = bases.llama()
    with pytest.raises(TargetError, match="'c_attn' matched none of"):
        peft_dist.PeftModel.from_pretrained(base, tmp_path)
    assert all(p.requires_grad for p in base.parameters())
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear


def test_a_pickle_is_refused(tmp_path) -> None:
    model = peft_dist.get_peft_model(bases.llama(), lora())
    model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.bin, which runs code when it is read"):
        peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path)
    with pytest.raises(ConfigError, match="safe_serialization=False would write a pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)


def test_saving_what_another_library_gathered(tmp_path) -> None:
    model = peft_dist.get_peft_model(bases.llama(), lora())
    disturb(model)
    gathered = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    own = peft_dist.get_peft_model_state_dict(model)
    for key, value in saved.items():
        torch.testing.assert_close(value, own[key] + 1)


def test_cards_keep_their_text(tmp_path) -> None:
    model = peft_dist.get_peft_model(bases.llama(), lora())
    model.create_or_update_model_card(tmp_path / "new")
    assert "library_name: peft" in (tmp_path / "new" / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine\n")
    model.create_or_update_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\n") and text.endswith("# Mine\n") and "library_name: peft" in text


# Functions


def test_injecting_where_a_state_dict_says(tmp_path) -> None:
    theirs = peft.get_peft_model(bases.llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    tensors = {
        key.removeprefix("base_model.model."): value
        for key, value in peft.get_peft_model_state_dict(theirs).items()
    }
    with pytest.warns(RuntimeWarning) as said:
        model = peft_dist.inject_adapter_in_model(
            peft_dist.LoraConfig(r=4, target_modules=["v_proj"]), bases.llama(), state_dict=tensors
        )
    said = [str(each.message) for each in said if "more layers" in str(each.message)]
    assert (
        len(said) == 2 and "the config means 2 more layers" in said[0] and "has tensors of 4 more" in said[1]
    )
    result = peft_dist.set_peft_model_state_dict(model, tensors)
    assert not result.missing_keys and not result.unexpected_keys
    assert peft_dist.get_peft_model_state_dict(model).keys() == tensors.keys()
    with pytest.raises(ConfigError, match="no name of the state_dict"):
        peft_dist.inject_adapter_in_model(lora(), bases.llama(), state_dict={"a.b": torch.zeros(1)})
    with pytest.warns(UserWarning, match=r"has adapters already \(default\): 'b' is put beside them"):
        peft_dist.inject_adapter_in_model(lora(), model, "b")
    with pytest.raises(ConfigError, match="cannot be injected"):
        prompt = peft_dist.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
        peft_dist.inject_adapter_in_model(prompt, bases.llama())


def test_functions_on_a_model_without_a_class() -> None:
    base = bases.llama()
    bare = base(IDS).logits
    functional.inject_adapter_in_model(lora(), base, "a")
    functional.inject_adapter_in_model(lora(target_modules=["k_proj"]), base, "b")
    functional.set_adapter(base, "a")
    disturb(base)
    first = base(IDS).logits
    functional.set_adapter(base, ["b"])
    torch.testing.assert_close(base(IDS).logits, bare)
    functional.set_requires_grad(base, "b", False)
    assert not any(p.requires_grad for p in base.parameters())
    functional.set_adapter(base, "a")
    torch.testing.assert_close(base(IDS).logits, first)
    assert functional.delete_adapter(base, "b") == ["a"]
    assert functional.delete_adapter(base, "a") is None
    torch.testing.assert_close(base(IDS).logits, bare)
    with pytest.raises(AdapterError, match="no layer has one of this name"):
        functional.set_adapter(base, "c")
    half = functional.inject_adapter_in_model(lora(), bases.llama().bfloat16())
    half.to(torch.bfloat16)
    functional.cast_adapter_dtype(half, "default")
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}


def test_signatures_and_what_is_an_adapter(tmp_path) -> None:
    model = peft_dist.get_peft_model(bases.llama(), lora(task_type="CAUSAL_LM"))
    before = model(IDS).logits
    signatures.update_signature(model)
    assert list(inspect.signature(model.forward).parameters) == [
        name for name in inspect.signature(LlamaForCausalLM.forward).parameters if name != "self"
    ]
    assert "generation_config" in inspect.signature(model.generate).parameters
    assert torch.equal(model(IDS).logits, before)
    with pytest.raises(ValueError, match="method both is not supported"):
        signatures.update_signature(model, "both")
    model.save_pretrained(tmp_path)
    assert signatures.check_if_peft_model(tmp_path) and not signatures.check_if_peft_model(tmp_path / "no")


def test_scaling_for_a_while() -> None:
    ours = peft_dist.get_peft_model(bases.llama(), lora(use_dora=False)).eval()
    disturb(ours)
    whole = ours(IDS).logits
    with ours.disable_adapter():
        bare = ours(IDS).logits
    with scaling.rescale_adapter_scale(ours, 0):
        torch.testing.assert_close(ours(IDS).logits, bare)
    with scaling.rescale_adapter_scale(ours, 0.5):
        half = ours(IDS).logits
        layer = ours.get_base_model().model.layers[0].self_attn.q_proj
        assert layer.scaling == {"default": 0.75}
    assert not torch.allclose(half, whole) and not torch.allclose(half, bare)
    assert torch.equal(ours(IDS).logits, whole)
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        scaling.rescale_adapter_scale(bases.llama(), 1),
    ):
        pass
    with pytest.raises(TypeError, match="type float"), scaling.rescale_adapter_scale(ours, "1"):
        pass


def test_dtypes_left_to_hooks() -> None:
    model = peft_dist.get_peft_model(bases.llama().bfloat16(), lora(target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 16, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    disturb(model)
    A, B = (getattr(layer, key)["default"].weight for key in ("lora_A", "lora_B"))
    with scaling.disable_input_dtype_casting(model):
        change = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(
            change, layer.scaling["default"] * (x @ A.bfloat16().T @ B.bfloat16().T), atol=2e-2, rtol=5e-2
        )
    with scaling.disable_input_dtype_casting(model, active=False):
        layer(x)


def test_weights_that_hooks_cast_for_their_layers_call() -> None:
    """As libraries do that keep a base in fewer bits than it computes in."""
    model = peft_dist.get_peft_model(bases.llama(), lora(target_modules=["q_proj"]))
    disturb(model)
    layer, x = model.get_base_model().model.layers[0].self_attn.q_proj, torch.randn(2, 16)
    wanted = layer(x)
    model.half()
    linear = layer.base_layer

    def widen(module, args):
        for parameter in module.parameters():
            parameter.data = parameter.data.float()

    def narrow(module, args, output):
        for parameter in module.parameters():
            parameter.data = parameter.data.half()

    linear.register_forward_pre_hook(widen)
    linear.register_forward_hook(narrow)
    with scaling.disable_input_dtype_casting(model):
        y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, wanted, atol=5e-3, rtol=5e-3)
    assert linear.weight.dtype == torch.float16


def test_mixed_precision_of_frozen_and_trained() -> None:
    model = peft_dist.get_peft_model(bases.llama().bfloat16(), lora(target_modules=["q_proj"]))
    scaling.cast_mixed_precision_params(model, torch.float16)
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {
        (torch.float16, False),
        (torch.float32, True),
    }


def test_the_bases_own_tensors() -> None:
    base = bases.llama()
    want = {key: value.clone() for key, value in base.state_dict().items()}
    model = peft_dist.get_peft_model(base, lora(modules_to_save=["lm_head"]))
    own = peft_dist.get_base_model_state_dict(model)
    assert own.keys() == want.keys() and all(torch.equal(own[key], want[key]) for key in want)
    peft_dist.set_base_model_state_dict(model, {key: value + 1 for key, value in want.items()})
    assert torch.equal(
        base.model.layers[0].self_attn.q_proj.weight, want["model.layers.0.self_attn.q_proj.weight"] + 1
    )
    with pytest.raises(CheckpointError, match="the first is 'nothing'"):
        peft_dist.set_base_model_state_dict(model, {**want, "nothing": torch.zeros(1)})


# Hot swap


def two(tmp_path, **second):
    """Two adapters on disk, and the logits of each."""
    outputs = []
    for number, more in ((0, {}), (1, second)):
        model = peft_dist.get_peft_model(bases.llama(), lora(task_type="CAUSAL_LM", **more)).eval()
        disturb(model, number + 5)
        outputs.append(model(IDS).logits.detach())
        model.save_pretrained(tmp_path / str(number))
    return outputs


@pytest.mark.parametrize("second", [{}, {"r": 2}, {"r": 8, "lora_alpha": 3}, {"target_modules": ["v_proj"]}])
def test_an_adapter_is_swapped(second, tmp_path) -> None:
    first, want = two(tmp_path, **second)
    model = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "0")
    torch.testing.assert_close(model(IDS).logits, first)
    kept = [p for p in model.parameters() if p.ndim == 2]
    hotswap.hotswap_adapter(model, tmp_path / "1", "default")
    torch.testing.assert_close(model(IDS).logits, want)
    if not second:
        assert all(a is b for a, b in zip(kept, [p for p in model.parameters() if p.ndim == 2], strict=True))
    hotswap.hotswap_adapter(model, tmp_path / "0", "default") if "target_modules" not in second else None
    if "target_modules" not in second:
        torch.testing.assert_close(model(IDS).logits, first)


def test_a_compiled_model_is_not_compiled_again(tmp_path) -> None:
    first, want = two(tmp_path, r=2, lora_alpha=3)
    model = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "0")
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    assert model.peft_config["default"].r == 8
    torch.testing.assert_close(model(IDS).logits, first)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS).logits, first)
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap.hotswap_adapter(compiled, tmp_path / "1", "default")
        torch.testing.assert_close(compiled(IDS).logits, want)
        hotswap.hotswap_adapter(compiled, tmp_path / "0", "default")
        torch.testing.assert_close(compiled(IDS).logits, first)
    with pytest.raises(ConfigError, match="before the model is compiled"):
        hotswap.prepare_model_for_compiled_hotswap(compiled)


@pytest.mark.parametrize("more", [{}, {"lora_bias": True}, {"bias": "lora_only"}])
@pytest.mark.parametrize("prepared", [False, True])
def test_other_ranks_are_swapped_on_groups_and_beside_biases(more, prepared, tmp_path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 6))

    x, outputs = torch.randn(2, 4, 4, 4), []
    for r in (2, 4):
        config = peft_dist.LoraConfig(r=r, lora_alpha=3 * r, target_modules=["0", "2"], **more)
        model = peft_dist.get_peft_model(base(), config).eval()
        disturb(model, r)
        outputs.append(model(x).detach())
        model.save_pretrained(tmp_path / str(r))
    model = peft_dist.PeftModel.from_pretrained(base(), tmp_path / "2").eval()
    if prepared:
        with pytest.raises(ConfigError, match="2 groups, which must divide it"):
            hotswap.prepare_model_for_compiled_hotswap(model, target_rank=5)
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
        torch.testing.assert_close(model(x), outputs[0])
    hotswap.hotswap_adapter(model, tmp_path / "4", "default")
    torch.testing.assert_close(model(x), outputs[1])
    assert not torch.allclose(outputs[0], outputs[1])
    hotswap.hotswap_adapter(model, tmp_path / "2", "default")
    torch.testing.assert_close(model(x), outputs[0])


def test_a_bias_is_not_swapped_into_what_has_none(tmp_path) -> None:
    two(tmp_path, lora_bias=True, target_modules=["q_proj"])
    model = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "0")
    before = model(IDS).logits
    with pytest.raises(RuntimeError, match=r"unexpected keys found: .*lora_B\.bias"):
        hotswap.hotswap_adapter(model, tmp_path / "1", "default")
    assert torch.equal(model(IDS).logits, before)


def test_what_cannot_be_swapped(tmp_path) -> None:
    _, _ = two(tmp_path, target_modules=["v_proj", "k_proj"])
    model = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "0")
    before = model(IDS).logits
    with pytest.raises(RuntimeError, match=r"did not succeed, unexpected keys found: base_model.*k_proj"):
        hotswap.hotswap_adapter(model, tmp_path / "1", "default")
    with pytest.raises(AdapterError, match="the model has none of this name"):
        hotswap.hotswap_adapter(model, tmp_path / "1", "other")
    assert torch.equal(model(IDS).logits, before)
    for one, other, message in (
        (lora(), lora(use_rslora=True), "for use_rslora, False != True"),
        (lora(), lora(lora_dropout=0.5), "for lora_dropout, 0.0 != 0.5"),
        (lora(), peft_dist.IA3Config(), "Incompatible PEFT types found: LORA and IA3"),
        (peft_dist.IA3Config(), peft_dist.IA3Config(), "only supports LORA but IA3 was passed"),
    ):
        with pytest.raises(ValueError, match=message):
            hotswap.check_hotswap_configs_compatible(one, other)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="currently merged into the base weights"):
        hotswap.hotswap_adapter(model, tmp_path / "0", "default")
    with pytest.raises(AdapterError, match="over target_rank 2"):
        hotswap.prepare_model_for_compiled_hotswap(
            peft_dist.get_peft_model(bases.llama(), lora()), target_rank=2
        )
    with pytest.raises(AdapterError, match="No adapter layers found"):
        hotswap.prepare_model_for_compiled_hotswap(bases.llama())
    assert dataclasses.is_dataclass(copy.copy(lora()))


# Signatures


SAME = {
    "PeftModelForCausalLM": (
        "from_pretrained", "load_adapter", "add_adapter", "set_adapter", "delete_adapter",
        "set_requires_grad", "create_or_update_model_card", "disable_adapter",
    ),
    "PeftMixedModel": ("add_adapter", "set_adapter", "from_pretrained"),
    "LoraModel": (
        "merge_adapter", "unmerge_adapter", "merge_and_unload", "unload", "delete_adapter", "set_adapter",
        "inject_adapter", "set_requires_grad", "get_model_config", "add_weighted_adapter",
    ),
    "AutoPeftModel": ("from_pretrained",),
    "PeftConfig": ("from_pretrained", "save_pretrained", "to_dict", "from_json_file"),
}  # fmt: skip
FUNCTIONS = (
    "get_peft_model", "inject_adapter_in_model", "get_peft_model_state_dict", "set_peft_model_state_dict",
    "get_layer_status", "get_model_status", "get_peft_config", "cast_mixed_precision_params",
    "shift_tokens_right", "get_base_model_state_dict", "set_base_model_state_dict", "prepare_model_for_kbit_training",
)  # fmt: skip


def parameters(function) -> list[tuple[str, object]]:
    return [
        (p.name, p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]


@pytest.mark.parametrize(
    "path", [*(f"{cls}.{name}" for cls, names in SAME.items() for name in names), *FUNCTIONS]
)
def test_arguments_come_in_their_order(path) -> None:
    mine, other = peft_dist, peft
    for part in path.split("."):
        mine, other = getattr(mine, part), getattr(other, part)
    wanted = parameters(other)
    assert parameters(mine)[: len(wanted)] == wanted


def test_what_goes_to_the_hub_is_the_adapter(tmp_path, monkeypatch) -> None:
    """Not the base, whose own `push_to_hub` the model would lend."""
    asked, sent = [], {}

    class Hub:
        def __init__(self, token=None) -> None:
            asked.append(("token", token))

        def create_repo(self, repo_id, private=None, exist_ok=False) -> types.SimpleNamespace:
            asked.append(("repo", repo_id, private))
            return types.SimpleNamespace(repo_id=f"me/{repo_id}")

        def create_branch(self, repo_id, branch, exist_ok) -> None:
            asked.append(("branch", repo_id, branch))

        def upload_folder(self, repo_id, folder_path, **told) -> str:
            sent.update({p.name: p.read_bytes() for p in folder_path.iterdir()})
            asked.append(("upload", repo_id, told["commit_message"], told["revision"]))
            return "done"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(r=2, target_modules=["q_proj"]))
    told = model.push_to_hub(
        "mine", private=True, revision="try", token="t", max_shard_size="1GB", tags=["new"]
    )
    assert told == "done" and set(sent) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert asked == [
        ("token", "t"),
        ("repo", "mine", True),
        ("branch", "me/mine", "try"),
        ("upload", "me/mine", "Upload model", "try"),
    ]
    assert b"- new" in sent["README.md"] and b"- lora" in sent["README.md"]
    sent.clear()
    model.peft_config["default"].push_to_hub("mine", commit_message="a config")
    assert list(sent) == ["adapter_config.json"] and asked[-1] == ("upload", "me/mine", "a config", None)


def test_what_is_said_of_a_load_and_of_embeddings(tmp_path) -> None:
    config = peft_dist.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    model = peft_dist.get_peft_model(bases.llama(), config)
    with pytest.warns(
        UserWarning, match="^Setting `save_embedding_layers` to `True` as embedding layers found"
    ):
        model.save_pretrained(tmp_path)
    result = model.load_adapter(tmp_path, "again", torch_device="cpu")
    assert repr(result) == "<All keys matched successfully>" and result == ([], [])
    assert (
        peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path, torch_device="cpu").active_adapter
        == "default"
    )
    with pytest.raises(ValueError, match="must be a PeftConfig, got <class 'int'>"):
        peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path, config=3)
    with pytest.raises(AdapterError, match="adapter 3: a name is text, such as '3'"):
        model.add_adapter(3, config)
    assert list(model.peft_config) == ["default", "again"]


def test_a_second_model_around_a_base_names_rows_and_reads_what_its_adapters_need() -> None:
    """The layers were wrapped for the first one."""
    base, ids = bases.llama().eval(), torch.cat([IDS, IDS.flip(1)])
    plain = base(ids).logits
    peft_dist.get_peft_model(base, lora(init_lora_weights=False))
    with pytest.warns(UserWarning, match="for a second time"):
        second = peft_dist.get_peft_model(base, lora(init_lora_weights=False)).eval()
    alone = peft_dist.get_peft_model(bases.llama(), lora()).eval()
    peft_dist.set_peft_model_state_dict(alone, peft_dist.get_peft_model_state_dict(second))
    named = second(ids, adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(named[0], plain[0])
    torch.testing.assert_close(named[1], alone(ids).logits[1])
    assert not torch.allclose(named[1], plain[1])


@pytest.mark.filterwarnings("ignore:You are trying to modify a model")
@pytest.mark.parametrize("kind", ["VeraConfig", "PolyConfig"])
def test_a_second_model_around_a_base_has_its_own_shared_tensors_and_batch(kind) -> None:
    base, outputs = bases.llama().eval(), []
    more = {"task_ids": torch.zeros(len(IDS), dtype=torch.long)} if kind == "PolyConfig" else {}
    for number in (1, 2):
        seed = {"projection_prng_key": number} if kind == "VeraConfig" else {}
        config = getattr(peft_dist, kind)(r=4, target_modules=["q_proj"], **seed)
        model = peft_dist.get_peft_model(base, config).eval()
        disturb(model, number)
        alone = peft_dist.get_peft_model(bases.llama(), copy.deepcopy(config)).eval()
        peft_dist.set_peft_model_state_dict(alone, peft_dist.get_peft_model_state_dict(model))
        outputs.append(model(IDS, **more).logits)
        torch.testing.assert_close(outputs[-1], alone(IDS, **more).logits)
    assert not torch.allclose(*outputs)
