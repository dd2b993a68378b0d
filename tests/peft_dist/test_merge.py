"""Law 5: a merged base gives what base and adapters gave, and unmerging gives the stored bits back."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import peft_dist
from peft_dist import checkpoint, merge
from peft_dist.entry import get_peft_model
from peft_dist.errors import AdapterError, MergeError
from peft_dist.methods.activation.ia3 import IA3Config
from peft_dist.methods.prompt.prompt_tuning import PromptTuningConfig
from peft_dist.methods.weight.lora import LoraConfig
from peft_dist.model import PeftModel

IDS = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(5))
MERGEABLE = {
    "LORA": LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"], bias="all"),
    "IA3": IA3Config(target_modules=["q_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def llama(dtype: torch.dtype = torch.float32, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=2, attention_bias=True, **sizes, **changes)
    return LlamaForCausalLM(config).to(dtype)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


def disturb(model: nn.Module, name: str = "default", seed: int = 7, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in checkpoint.adapter_parameters(model, name).values():
        noise = torch.randn(parameter.shape, generator=generator) * size
        parameter.data.add_(noise.to(parameter.dtype))


def adapted(base: nn.Module, method: str) -> PeftModel:
    model = get_peft_model(base, copy.deepcopy(MERGEABLE[method]))
    disturb(model)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def bits(base: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in base.state_dict().items()}


@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_equals_adapted_and_unmerging_restores_the_bits(method: str) -> None:
    model = adapted(llama(torch.float64), method)
    base, expected, before = model.get_base_model(), logits(model), bits(model.get_base_model())
    assert (expected - logits(llama(torch.float64))).abs().max() > 1e-3
    assert merge.merge(base) == ["default"]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    merge.unmerge(base)
    assert all(torch.equal(value, before[name]) for name, value in bits(base).items())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", MERGEABLE)
def test_bf16_is_rounded_once_and_unmerges_to_its_bits(method: str) -> None:
    model = adapted(llama(torch.bfloat16), method)
    base, expected, before = model.get_base_model(), logits(model), bits(model.get_base_model())
    merge.merge(base)
    # Weights of magnitude 0.1 are rounded to 8 bits, twice 2 layers deep: logits of about 0.5 move by 1e-2.
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=3e-2)
    merge.unmerge(base)
    assert all(torch.equal(value, before[name]) for name, value in bits(base).items())


@pytest.mark.parametrize("method", MERGEABLE)
def test_unloading_gives_a_plain_model_that_saves_and_runs(method: str, tmp_path: object) -> None:
    model = adapted(llama(torch.float64), method)
    expected = logits(model)
    plain = merge.merge_and_unload(model.get_base_model())
    assert type(plain) is LlamaForCausalLM
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in llama().named_modules()]
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-12)
    plain.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(value, bits(plain)[name]) for name, value in bits(loaded).items())
    # Not bit for bit: where a weight begins in memory decides how BLAS adds.
    torch.testing.assert_close(logits(loaded), logits(plain), rtol=0, atol=1e-12)


def test_unload_without_merging_gives_the_base_back() -> None:
    model = adapted(llama(), "LORA")
    merge.merge(model.get_base_model())
    plain = merge.unload(model.get_base_model())
    assert torch.equal(logits(plain), logits(llama()))
    assert bits(plain).keys() == bits(llama()).keys()


def test_conv1d_merges_in_its_own_orientation() -> None:
    config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(gpt2().double(), config).eval()
    disturb(model)
    expected = logits(model)
    plain = merge.merge_and_unload(model.get_base_model())
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("second", MERGEABLE)
def test_several_adapters_merge_as_they_serve(second: str, at_once: bool) -> None:
    model = adapted(llama(torch.float64), "LORA")
    config = copy.deepcopy(MERGEABLE[second])
    config.target_modules = ["q_proj", "o_proj", "down_proj"]
    model.add_adapter("second", config)
    disturb(model, "second", seed=8)
    base, before = model.get_base_model(), bits(model.get_base_model())
    for _, module in merge.adapter_modules(base):
        module.active_adapters = ["default", "second"]
    expected = logits(model)
    if at_once:
        assert merge.merge(base, ["default", "second"]) == ["default", "second"]
    else:
        assert merge.merge(base, ["default"]) == ["default"]
        assert merge.merge(base, ["second"]) == ["default", "second"]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        assert merge.merge(base, ["second"]) == ["default", "second"]
    merge.unmerge(base)
    assert all(torch.equal(value, before[name]) for name, value in bits(base).items())


def test_one_merged_adapter_is_all_that_serves() -> None:
    model = adapted(llama(torch.float64), "LORA")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"]))
    disturb(model, "second", seed=8)
    model.set_adapter("default")
    expected = logits(model)
    base = model.get_base_model()
    merge.merge(base, ["default"])
    for _, module in merge.adapter_modules(base):
        module.active_adapters = ["default", "second"]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)


def test_modules_to_save_take_the_place_of_the_bases_own() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(llama(torch.float64), config).eval()
    disturb(model)
    expected = logits(model)
    base = model.get_base_model()
    merge.merge(base)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    plain = merge.merge_and_unload(base)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-12)
    assert bits(plain).keys() == bits(llama()).keys()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_weight_is_untied_by_a_merge_and_tied_again(target: str) -> None:
    base = llama(torch.float64, tie_word_embeddings=True)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[target])).eval()
    disturb(model)
    expected, before = logits(model), bits(base)
    merge.merge(base)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    merge.unmerge(base)
    assert all(torch.equal(value, before[name]) for name, value in bits(base).items())
    embedding = getattr(base.get_input_embeddings(), "base_layer", base.get_input_embeddings())
    head = getattr(base.get_output_embeddings(), "base_layer", base.get_output_embeddings())
    assert embedding.weight is head.weight
    plain = merge.merge_and_unload(base)
    assert not plain.config.tie_word_embeddings
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-12)


WHOLE = {
    "the embedding": {"modules_to_save": ["embed_tokens"]},
    "the head": {"modules_to_save": ["lm_head"]},
    "each by itself": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "one for both": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("which", WHOLE)
def test_a_tied_module_that_is_trained_whole_leaves_the_other_as_it_was(which: str, tmp_path) -> None:
    base = llama(torch.float64, tie_word_embeddings=True)
    together = which == "one for both"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **WHOLE[which])).eval()
    assert ["merging it unties them" in str(each.message) for each in said] == [True] * (not together)
    disturb(model)
    expected = logits(model)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-12)
    assert plain.config.tie_word_embeddings is together
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) is together
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-12)


def test_safe_merge_refuses_a_broken_adapter_and_changes_nothing() -> None:
    model = adapted(llama(), "LORA")
    base, before = model.get_base_model(), bits(model.get_base_model())
    places = checkpoint.adapter_parameters(model, "default")
    last = [key for key in places if key.endswith("down_proj.lora_B.weight")][-1]
    places[last].data[0, 0] = float("nan")
    with pytest.raises(MergeError) as caught:
        merge.merge(base, safe_merge=True)
    assert str(caught.value) == (
        "model.layers.1.mlp.down_proj: the weight merged with 'default' would not be finite. "
        "The adapter seems to be broken; nothing was merged."
    )
    after = bits(base)
    # The broken tensor itself is NaN, which equals nothing: compare what is not the adapter's.
    assert all(torch.equal(value, before[name]) for name, value in after.items() if "lora" not in name)
    places[last].data[0, 0] = 0.0
    expected = logits(model)
    merge.merge(base, safe_merge=True)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_overflow_in_the_bases_dtype_is_seen_too() -> None:
    model = get_peft_model(llama(torch.float16), LoraConfig(r=2, target_modules=["q_proj"]))
    for parameter in checkpoint.adapter_parameters(model, "default").values():
        parameter.data.fill_(300.0)
    with pytest.raises(MergeError, match="would not be finite"):
        merge.merge(model.get_base_model(), safe_merge=True)


def test_without_the_kept_bits_unmerging_is_refused() -> None:
    model = adapted(llama(), "IA3")
    base = model.get_base_model()
    merge.merge(base, keep=False)
    with pytest.raises(MergeError) as caught:
        merge.unmerge(base)
    assert str(caught.value) == (
        "model.layers.0.self_attn.q_proj: the stored weight was not kept when ['default'] was merged, and "
        "subtracting would not restore its bits. Load the base again, or merge with keep=True."
    )


def test_unknown_adapters_and_prompts_are_refused() -> None:
    base = adapted(llama(), "LORA").get_base_model()
    with pytest.raises(AdapterError) as caught:
        merge.merge(base, ["defualt"])
    assert (
        str(caught.value) == "merge: there is no adapter 'defualt'; there are: default. Closest: 'default'."
    )
    with pytest.raises(MergeError) as caught_prompt:
        merge.refuse_unmergeable({"p": PromptTuningConfig(num_virtual_tokens=2)}, None)
    assert str(caught_prompt.value) == (
        "adapter 'p': PROMPT_TUNING adds tokens before the input and changes no weight, so it cannot be "
        "merged. "
        "Serve it as an adapter."
    )
    merge.refuse_unmergeable({"p": PromptTuningConfig(num_virtual_tokens=2), "x": LoraConfig()}, ["x"])
    with pytest.warns(UserWarning, match="Already unmerged, nothing to do"):
        merge.unmerge(base)


def images() -> nn.Module:
    """Convolutions with norms between them; as many channels as places in a row."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 4, 1),
    )


def test_biases_of_layers_that_give_images() -> None:
    """They go along the channels: HF PEFT, which trains the base's own, gives the same."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    settings = {"r": 2, "target_modules": ["0"], "bias": "all"}
    model = peft_dist.get_peft_model(images(), peft_dist.LoraConfig(**settings)).eval()
    theirs = peft.get_peft_model(images(), peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(2)
    state = peft_dist.get_peft_model_state_dict(model)
    given = {key: t + 0.3 * torch.randn(t.shape, generator=generator) for key, t in state.items()}
    assert sum("bias" in key for key in given) == 5
    peft_dist.set_peft_model_state_dict(model, given)
    peft.set_peft_model_state_dict(theirs, given)
    y = model(x)
    torch.testing.assert_close(y, theirs(x), rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
