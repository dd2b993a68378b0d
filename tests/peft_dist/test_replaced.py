"""LN tuning and trainable tokens: rows, merging, several at once, tied weights, and where HF PEFT is wrong."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peft_dist
from peft_dist.errors import AdapterError, ConfigError, TargetError
from peft_dist.rows import BASE
from tests.contract.bases import gpt2, llama

IDS = torch.tensor([[5, 2, 9, 5, 7], [3, 2, 2, 40, 1], [5, 17, 6, 2, 63]])
TOKENS = {"task_type": "CAUSAL_LM", "token_indices": [5, 2, 63]}


def disturb(model: nn.Module, seed: int = 7, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * size)


def two(base: nn.Module, config) -> peft_dist.PeftModel:
    model = peft_dist.get_peft_model(base, config).eval()
    model.add_adapter("b", config)
    for seed, name in enumerate(("default", "b")):
        model.set_adapter(name)
        disturb(model, seed)
    model.set_requires_grad(["default", "b"], True)
    return model


CONFIGS = {
    "LN tuning": (llama, peft_dist.LNTuningConfig(task_type="CAUSAL_LM")),
    "LN tuning of GPT-2": (gpt2, peft_dist.LNTuningConfig(task_type="CAUSAL_LM")),
    "tokens": (llama, peft_dist.TrainableTokensConfig(**TOKENS)),
    "tokens of tied weights": (gpt2, peft_dist.TrainableTokensConfig(**TOKENS)),
    "tokens of a head": (llama, peft_dist.TrainableTokensConfig(**TOKENS, target_modules=["lm_head"])),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_name_adapters_and_each_gets_its_own_gradient(name) -> None:
    make, config = CONFIGS[name]
    model = two(make(), config)
    choices, alone = ["b", BASE, "default"], []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for row, choice in enumerate(choices):
        if choice == BASE:
            with model.disable_adapter():
                alone.append(model(input_ids=IDS[row : row + 1]).logits)
        else:
            model.set_adapter(choice)
            alone.append(model(input_ids=IDS[row : row + 1]).logits)
    model.set_requires_grad(["default", "b"], True)
    wanted = torch.cat(alone)
    got = model(input_ids=IDS, adapter_names=choices).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    theirs = torch.autograd.grad(wanted.square().sum(), parameters, allow_unused=True)
    mine = torch.autograd.grad(got.square().sum(), parameters, allow_unused=True)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_unloaded_and_put_back(name) -> None:
    make, config = CONFIGS[name]
    model = two(make(), config)
    model.set_adapter("b")
    y, plain = model(input_ids=IDS).logits, make()(input_ids=IDS).logits
    assert (y - plain).abs().max() > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, y, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(input_ids=IDS).logits, y)
    model.delete_adapter("default")
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, y, rtol=1e-5, atol=1e-5)
    model = two(make(), config)
    assert torch.equal(model.unload()(input_ids=IDS).logits, plain)


def test_ln_tuning_of_a_half_precision_base_trains_in_fp32() -> None:
    """As every other method; HF PEFT trains bf16 copies, whose small steps are lost to rounding."""
    dtypes = []
    for library in (peft_dist, peft):
        model = library.get_peft_model(llama().bfloat16(), library.LNTuningConfig(task_type="CAUSAL_LM"))
        dtypes.append({p.dtype for p in model.parameters() if p.requires_grad})
        assert model(input_ids=IDS).logits.dtype == torch.bfloat16
    assert dtypes == [{torch.float32}, {torch.bfloat16}]


@pytest.mark.parametrize("module", ["embed_tokens", "self_attn", "mlp", "lm_head"])
def test_a_whole_module_in_fp32_on_a_half_precision_base(module) -> None:
    """It is given tokens, tensors by name, or what the layer before gave, and gives what the base goes on with."""
    more = {"target_modules": ["up_proj" if module != "mlp" else "q_proj"], "task_type": "CAUSAL_LM"}
    model = peft_dist.get_peft_model(
        llama().bfloat16(), peft_dist.LoraConfig(r=2, modules_to_save=[module], **more)
    )
    theirs = peft.get_peft_model(llama().bfloat16(), peft.LoraConfig(r=2, modules_to_save=[module], **more))
    logits = model(input_ids=IDS).logits
    assert logits.dtype == torch.bfloat16
    exact = llama().bfloat16().float()(input_ids=IDS).logits
    assert (logits - exact).abs().max() <= (theirs(input_ids=IDS).logits - exact).abs().max()
    logits.float().square().sum().backward()
    trained = {
        name: p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name
    }
    assert trained and all(p.dtype == p.grad.dtype == torch.float32 for p in trained.values())


def test_a_module_without_parameters_is_refused() -> None:
    config = peft_dist.LNTuningConfig(target_modules=["rotary_emb"])
    with pytest.raises(TargetError, match=r"'model.rotary_emb' has no parameters that LN_TUNING could train"):
        peft_dist.get_peft_model(llama(), config)


def test_a_linear_layer_keeps_its_bias_under_trainable_tokens() -> None:
    """HF PEFT computes the layer with the new weight and without its bias."""
    x, outputs = torch.randn(2, 6), []
    for library in (peft_dist, peft):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 8))
        model = library.get_peft_model(
            base, library.TrainableTokensConfig(token_indices=[1, 4], target_modules=["0"])
        )
        outputs.append(model(x))
    torch.manual_seed(0)
    layer = nn.Linear(6, 8)
    torch.testing.assert_close(outputs[0], layer(x))
    torch.testing.assert_close(outputs[1], layer(x) - layer.bias)


def test_tied_weights_stay_of_one_mind(tmp_path) -> None:
    """The head's rows are the embedding's vectors: one Parameter, saved under both names as HF PEFT does."""
    model = peft_dist.get_peft_model(gpt2(), peft_dist.TrainableTokensConfig(**TOKENS)).eval()
    disturb(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.transformer.wte.trainable_tokens_delta.default"
    ]
    dense = gpt2().eval()
    with torch.no_grad():
        dense.transformer.wte.weight[TOKENS["token_indices"]] = next(
            p for p in model.parameters() if p.requires_grad
        )
    y = dense(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, y, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.{layer}.trainable_tokens_delta" for layer in ("transformer.wte", "lm_head")
    }
    for low in (False, True):
        again = peft_dist.PeftModel.from_pretrained(gpt2(), tmp_path, low_cpu_mem_usage=low)
        torch.testing.assert_close(again(input_ids=IDS).logits, y, rtol=1e-5, atol=1e-5)
    again.delete_adapter("default")
    assert type(again.get_base_model().lm_head) is nn.Linear
    both = peft_dist.TrainableTokensConfig(**TOKENS, target_modules=["wte", "lm_head"])
    model = peft_dist.get_peft_model(gpt2(), both)
    assert sum(p.requires_grad for p in model.parameters()) == 1
    torch.testing.assert_close(model(input_ids=IDS).logits, gpt2().eval()(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "LN tuning",
            "model.layers.0.input_layernorm: 'default' stands in the module's place, so 'b' cannot act",
        ),
        (
            "tokens",
            "model.embed_tokens: 3 tokens, such as 2, have vectors of two adapters, which cannot both be theirs. "
            "Activate one at a time, or train other tokens.",
        ),
    ],
)
def test_what_cannot_be_active_together_is_refused(name, message) -> None:
    make, config = CONFIGS[name]
    model = two(make(), config)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    for act in (model.base_model.set_adapter, lambda names: model.merge_adapter(adapter_names=names)):
        with pytest.raises(AdapterError) as raised:
            act(["default", "b"])
        assert str(raised.value).startswith(message)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    model(input_ids=IDS)


def test_the_padding_token_gets_no_gradient_as_theirs(tmp_path) -> None:
    config = {"token_indices": [5, 0], "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(llama(), peft.TrainableTokensConfig(**config))
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = peft_dist.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    ids, gradients = torch.tensor([[5, 0, 3, 0]]), []
    for model in (ours, theirs):
        model(input_ids=ids).logits.square().sum().backward()
        gradients.append(next(p.grad for p in model.parameters() if p.requires_grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    assert gradients[0][0].abs().sum() > 0 and not gradients[0][1].any()


def test_adapters_of_other_tokens_are_active_together() -> None:
    model = peft_dist.get_peft_model(llama(), peft_dist.TrainableTokensConfig(**TOKENS)).eval()
    disturb(model)
    model.add_adapter("b", peft_dist.TrainableTokensConfig(**{**TOKENS, "token_indices": [40, 7]}))
    model.set_adapter("b")
    disturb(model, 1)
    model.base_model.set_adapter(["default", "b"])
    dense = llama().eval()
    table = model.get_base_model().get_input_embeddings()
    with torch.no_grad():
        for name, tokens in (("default", TOKENS["token_indices"]), ("b", [40, 7])):
            dense.get_input_embeddings().weight[tokens] = table.trainable_tokens_delta[name]
    y = dense(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, y, rtol=1e-5, atol=1e-5)


def test_the_base_may_be_another_by_the_time_it_is_loaded(tmp_path) -> None:
    """The file holds vectors, not what they add to the base's."""
    model = peft_dist.get_peft_model(llama(), peft_dist.TrainableTokensConfig(**TOKENS))
    disturb(model)
    model.save_pretrained(tmp_path)
    other = llama()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    loaded = peft_dist.PeftModel.from_pretrained(other, tmp_path)
    saved = next(iter(load_file(tmp_path / "adapter_model.safetensors").values()))
    vectors = loaded.get_base_model().get_input_embeddings()(torch.tensor([TOKENS["token_indices"]]))[0]
    torch.testing.assert_close(vectors, saved)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "token_indices: []; it lists different tokens by their numbers, at least one."),
        (
            [1, 1],
            "TrainableTokensConfig.token_indices: [1, 1]; it lists different tokens by their numbers, at least one.",
        ),
        (
            [64],
            "token_indices: 64 is no token of model.embed_tokens, which has 64. Resize the embeddings first, or "
            "leave it out.",
        ),
    ],
)
def test_tokens_that_are_refused(tokens, message) -> None:
    base = llama()
    with pytest.raises(ConfigError) as raised:
        peft_dist.get_peft_model(base, peft_dist.TrainableTokensConfig(token_indices=tokens))
    assert str(raised.value) == message
    assert type(base.model.embed_tokens) is nn.Embedding
