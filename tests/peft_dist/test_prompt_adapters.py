"""A prompt adapter's life: several on one model, saved, loaded on, deleted, disabled, and what is refused."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import peft_dist
from peft_dist.errors import AdapterError, CheckpointError, ConfigError, PeftDistError, TaskError
from peft_dist.prompts.past import filled
from tests.contract import bases
from tests.contract.test_prompt_parity import PROMPTS, batch, disturb, make

IDS = torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(2))
KINDS = {
    "prompt": peft_dist.PromptTuningConfig,
    "network": peft_dist.PromptEncoderConfig,
    "past": peft_dist.PrefixTuningConfig,
}


def config(kind: str, n: int = 3, **more):
    return KINDS[kind](task_type="CAUSAL_LM", num_virtual_tokens=n, **more)


def several() -> peft_dist.PeftModel:
    model = peft_dist.get_peft_model(bases.llama(), config("prompt"), "prompt")
    model.add_adapter("network", config("network", 4, encoder_hidden_size=8))
    model.add_adapter("past", config("past", 5))
    return model


def test_several_are_saved_loaded_switched_and_deleted(tmp_path) -> None:
    model = several().eval()
    said = {}
    for name in KINDS:
        model.set_adapter(name)
        said[name] = model(IDS).logits
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all(f"prompt_encoder.{name}." in n for n in trained)
    model.save_pretrained(tmp_path)
    loaded = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "prompt", "prompt")
    for name in ("network", "past"):
        loaded.load_adapter(tmp_path / name, name)
    for name in KINDS:
        loaded.set_adapter(name)
        torch.testing.assert_close(loaded(IDS).logits, said[name], rtol=1e-5, atol=1e-5)
    with loaded.disable_adapter():
        base = bases.llama().eval()(IDS).logits
        assert torch.equal(loaded(IDS).logits, base)
    loaded.delete_adapter("past")
    assert loaded.active_adapters == ["prompt"] and list(loaded.prompt_encoder) == ["prompt", "network"]
    torch.testing.assert_close(loaded(IDS).logits, said["prompt"], rtol=1e-5, atol=1e-5)
    loaded.delete_adapter("prompt"), loaded.delete_adapter("network")
    assert torch.equal(loaded(IDS).logits, base) and "prompt_encoder" not in dict(loaded.named_children())


@pytest.mark.parametrize("name", ["p-tuning", "p-tuning by an LSTM", "prefix on GPT-2"])
def test_what_made_the_tokens_is_not_saved_and_training_goes_on_from_them(name, tmp_path) -> None:
    """HF PEFT refuses to load a prompt to train; put into a model with a network, it lets what was saved go
    through the network again."""
    model = make(name, peft_dist)
    disturb(model)
    model.save_pretrained(tmp_path)
    loaded = peft_dist.PeftModel.from_pretrained(
        getattr(bases, PROMPTS[name].base)(), tmp_path, is_trainable=True
    )
    trained = {n: p for n, p in loaded.named_parameters() if p.requires_grad}
    assert list(trained) == ["prompt_encoder.default.embedding.weight"]
    torch.testing.assert_close(loaded.eval()(IDS).logits, model.eval()(IDS).logits)
    loaded(IDS, labels=IDS).loss.backward()
    assert trained["prompt_encoder.default.embedding.weight"].grad.abs().sum() > 0
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(getattr(bases, PROMPTS[name].base)(), tmp_path, is_trainable=True)
    # The same into a model that has a network: it goes, since it did not make these.
    saved = load_file(tmp_path / "adapter_model.safetensors")
    other = make(name, peft_dist)
    result = peft_dist.set_peft_model_state_dict(other, saved)
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(other.eval()(IDS).logits, model(IDS).logits)
    assert [n for n, p in other.named_parameters() if p.requires_grad] == list(trained)
    if name == "p-tuning":
        theirs = make(name, peft)
        peft.set_peft_model_state_dict(theirs, saved)
        assert not torch.allclose(theirs.eval()(IDS).logits, model(IDS).logits, atol=1e-2)


@pytest.mark.parametrize("name", ["p-tuning", "p-tuning by an LSTM", "prefix on GPT-2", "cpt"])
def test_for_inference_nothing_is_built_that_is_not_saved(name) -> None:
    model = make(name, peft_dist, inference_mode=True)
    tokens = {n: p for n, p in model.named_parameters() if n.startswith("prompt_encoder")}
    assert list(tokens) == ["prompt_encoder.default.embedding.weight"]
    assert not any(p.requires_grad for p in model.parameters())
    saved = peft_dist.get_peft_model_state_dict(model)
    assert list(saved) == ["prompt_embeddings"] and torch.equal(saved["prompt_embeddings"], *tokens.values())


def test_a_context_goes_on_in_its_balls(tmp_path) -> None:
    model = make("cpt", peft_dist)
    disturb(model)
    model.save_pretrained(tmp_path)
    loaded = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path, is_trainable=True)
    ours, theirs = ({n: p for n, p in m.named_parameters() if "prompt" in n} for m in (loaded, model))
    context, delta = (f"prompt_encoder.default.{n}.weight" for n in ("embedding", "delta_embedding"))
    assert torch.equal(ours[context], theirs[context])
    assert [n for n, p in ours.items() if p.requires_grad] == [delta]
    # In evaluation the model keeps the delta as it is, and says what lies in the ball.
    loaded.train(), model.train()
    inputs = batch("cpt")
    torch.testing.assert_close(loaded(**inputs).loss, model(**inputs).loss)
    torch.testing.assert_close(ours[delta], theirs[delta], rtol=1e-5, atol=1e-6)


def test_context_training_is_theirs_step_by_step() -> None:
    ours, theirs = make("cpt with decay", peft_dist), make("cpt with decay", peft)
    inputs = batch("cpt with decay")
    losses = []
    for model in (ours.train(), theirs.train()):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        mine = []
        for _ in range(5):
            loss = model(**{key: value.clone() for key, value in inputs.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mine.append(loss.item())
        losses.append(mine)
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-5)


def test_evaluation_changes_no_context() -> None:
    model = make("cpt", peft_dist).eval()
    disturb(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    inputs = batch("cpt")
    with torch.no_grad():
        model(**inputs)
    peft_dist.get_peft_model_state_dict(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_context_without_an_answer_lets_the_text_be_one() -> None:
    ours, theirs = (make("cpt of one token", library) for library in (peft_dist, peft))
    labels = IDS.clone()
    assert theirs(input_ids=IDS, labels=labels).loss.isnan()
    said = ours(input_ids=IDS, labels=labels)
    logits = said.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(said.loss, torch.nn.functional.cross_entropy(logits, labels.flatten()))


def test_a_prefix_takes_the_decoders_own_sizes() -> None:
    sizes = {
        "vocab_size": 64,
        "d_model": 16,
        "d_kv": 6,
        "d_ff": 24,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    }
    odd = T5ForConditionalGeneration(T5Config(**sizes, num_layers=1, num_decoder_layers=3)).eval()
    config = peft_dist.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    plain = odd(input_ids=IDS, labels=IDS).logits
    model = peft_dist.get_peft_model(odd, config).eval()
    assert (config.num_layers, config.token_dim, config.num_attention_heads) == (3, 12, 2)
    assert not torch.allclose(model(input_ids=IDS, labels=IDS).logits, plain)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        T5ForConditionalGeneration(T5Config(**sizes, num_layers=1, num_decoder_layers=3)),
        peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3),
    )
    with pytest.raises((RuntimeError, IndexError)):
        theirs(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("heads", [{}, {"num_global_key_value_heads": 1, "attention_k_eq_v": True}])
def test_a_prefix_on_layers_that_keep_other_widths_and_on_some_that_keep_nothing(heads) -> None:
    facts = Gemma4TextConfig(
        **{**bases.LLAMA, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
        head_dim=6,
        global_head_dim=12,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=4,
        layer_types=["sliding_attention", "full_attention"] * 3,
        **heads,
    )
    torch.manual_seed(0)
    base = Gemma4ForCausalLM(facts).eval()
    tokens, said = torch.randn(3, 6 * 2 * 12 * (1 if heads else 2)), []
    for library in (peft, peft_dist):
        chosen = library.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = library.get_peft_model(copy.deepcopy(base), chosen).eval()
        library.set_peft_model_state_dict(model, {"prompt_embeddings": tokens})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = model(IDS, labels=IDS)
        said.append((chosen.token_dim, output.logits.detach(), output.loss.item()))
    told = any("layers 0, 2 keep more or wider heads" in str(warning.message) for warning in caught)
    assert told == bool(heads)
    assert said[0][0] == said[1][0]
    torch.testing.assert_close(said[1][1], said[0][1], rtol=0, atol=1e-5)
    assert not torch.allclose(said[1][1], base(IDS).logits)
    keys_and_values = [(torch.zeros(3, 1, 3, 2),) * 2] * 6
    with pytest.raises(ConfigError, match="layers 0, 1, 2, 3 keep more or wider heads"):
        filled(model.get_base_model(), None, keys_and_values)


def test_an_adaption_prompt_of_other_widths() -> None:
    """Beside the formula; heads of 6, four of queries on two of keys, in a model of 16."""
    facts = MistralConfig(**{**bases.LLAMA, "num_attention_heads": 4, "head_dim": 6, "num_hidden_layers": 1})
    values = {"adapter_len": 3, "adapter_layers": 1, "task_type": "CAUSAL_LM"}
    model = peft_dist.get_peft_model(
        MistralForCausalLM(facts), peft_dist.AdaptionPromptConfig(**values)
    ).eval()
    (prompt, gate) = model.adapter_tensors().values()
    with torch.no_grad():
        gate.fill_(0.7)
    seen = {}
    block = model.get_base_model().model.layers[0].self_attn
    block.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(kwargs=kwargs, given=output[0]), with_kwargs=True
    )
    bare = block.base_layer
    bare.register_forward_hook(lambda module, args, output: seen.update(before=output[0]))
    model(IDS)
    x, (cos, sin) = seen["kwargs"]["hidden_states"], seen["kwargs"]["position_embeddings"]
    q = bare.q_proj(x).view(3, 6, 4, 6)
    q = q * cos[:, :, None] + torch.cat([-q[..., 3:], q[..., :3]], -1) * sin[:, :, None]
    k, v = (layer(prompt)[0].view(3, 2, 6) for layer in (bare.k_proj, bare.v_proj))
    heads = []
    for head in range(4):
        scores = (q[:, :, head] @ k[:, head // 2].T / 6**0.5).softmax(-1)
        heads.append(0.7 * scores @ v[:, head // 2])
    wanted = seen["before"] + bare.o_proj(torch.cat(heads, -1))
    torch.testing.assert_close(seen["given"], wanted)
    theirs = peft.get_peft_model(MistralForCausalLM(facts), peft.AdaptionPromptConfig(**values))
    with pytest.raises(RuntimeError):
        theirs(IDS)


def test_widths_that_a_config_says_otherwise() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    narrow = OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=12, max_position_embeddings=40)
    for base, facts, kind, shape in (
        (OPTForCausalLM, narrow, "prompt", (3, 12)),
        (FalconForCausalLM, FalconConfig(**sizes), "past", (3, 2 * 2 * 8)),
    ):
        model = peft_dist.get_peft_model(base(facts), config(kind))
        assert tuple(peft_dist.get_peft_model_state_dict(model)["prompt_embeddings"].shape) == shape
        assert model(IDS, labels=IDS).loss.isfinite()
        hf = {"prompt": peft.PromptTuningConfig, "past": peft.PrefixTuningConfig}[kind]
        theirs = peft.get_peft_model(base(facts), hf(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with pytest.raises(RuntimeError):
            theirs(IDS)


@pytest.mark.parametrize("n", [4, 9])
def test_an_adaption_prompt_beside_theirs_and_the_bias_that_it_adds_again(n) -> None:
    """Tokens fewer and more than a head is wide. With a bias in O a new adapter of HF PEFT's changes the output."""
    values = {"adapter_len": n, "adapter_layers": 2, "task_type": "CAUSAL_LM"}
    ours = peft_dist.get_peft_model(bases.llama(), peft_dist.AdaptionPromptConfig(**values)).eval()
    theirs = peft.get_peft_model(bases.llama(), peft.AdaptionPromptConfig(**values)).eval()
    mine = ours.adapter_tensors()
    with torch.no_grad():
        for key, p in theirs.state_dict().items():
            if "adaption" in key:
                p.copy_(torch.randn_like(p))
                mine[key].copy_(p)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    base = bases.llama().eval()
    for layer in base.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.bias)
    plain = base(IDS).logits
    twin = copy.deepcopy(base)
    new = peft_dist.get_peft_model(base, peft_dist.AdaptionPromptConfig(**values))
    torch.testing.assert_close(new(IDS).logits, plain)
    assert not torch.allclose(
        peft.get_peft_model(twin, peft.AdaptionPromptConfig(**values))(IDS).logits, plain, atol=1e-2
    )


def test_gradient_checkpointing_and_a_prefix() -> None:
    """Layers that are computed again keep no keys and values, so the prefix would be lost without a word."""
    base = bases.llama()
    base.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="PrefixTuningConfig: does not work with gradient checkpointing"):
        peft_dist.get_peft_model(base, config("past"))
    assert not any("prompt" in name for name, _ in base.named_modules())
    model = peft_dist.get_peft_model(bases.llama(), config("past"))
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ConfigError, match="does not work with gradient checkpointing"):
        model(IDS, labels=IDS)
    model.get_base_model().gradient_checkpointing_disable()
    assert model(IDS, labels=IDS).loss.requires_grad


@pytest.mark.parametrize("kind", ["prompt", "network"])
def test_gradient_checkpointing_changes_no_gradient(kind) -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = peft_dist.get_peft_model(bases.llama(), config(kind)).train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_what_cannot_be_is_refused_and_leaves_the_model_as_it_was(tmp_path) -> None:
    model = several()
    names = set(model.state_dict())
    for wrong, error, said in (
        (
            config("prompt", token_dim=99),
            ConfigError,
            r"PromptTuningConfig.token_dim: 99, but the base has 16",
        ),
        (config("past", num_layers=1), ConfigError, r"PrefixTuningConfig.num_layers: 1, but the base has 2"),
        (
            config("prompt", num_transformer_submodules=2),
            ConfigError,
            r"num_transformer_submodules: 2, which task_type CAUSAL_LM means too, but the base has one stack",
        ),
        (
            peft_dist.PromptTuningConfig(num_virtual_tokens=3),
            TaskError,
            r"task_type: a prompt method needs one",
        ),
        (
            peft_dist.MultitaskPromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=2, prompt_tuning_init="ONLY_SOURCE_SHARED"
            ),
            ConfigError,
            "prompt_tuning_init_state_dict_path: must be given",
        ),
    ):
        with pytest.raises(error, match=said):
            model.add_adapter("wrong", wrong)
        assert set(model.state_dict()) == names and "wrong" not in model.peft_config
    with pytest.raises(KeyError):
        peft_dist.get_peft_model(bases.llama(), peft_dist.PromptTuningConfig(num_virtual_tokens=3))
    with pytest.raises(PeftDistError, match="adds tokens before the input and changes no weight"):
        model.merge_adapter(["past"])
    with pytest.raises(AdapterError, match="the model has one of this name"):
        model.add_adapter("past", config("past"))
    model.save_pretrained(tmp_path)
    path = tmp_path / "past" / "adapter_model.safetensors"
    good = load_file(path)["prompt_embeddings"]
    for wrong, said in (
        ({"prompt_embeddings": good[:2]}, r"'prompt_embeddings' is \(2, 64\) there and \(5, 64\) here"),
        ({"embeddings": good}, "none of the 1 tensors belongs to adapter"),
        ({"prompt_embeddings": good, "more": good.clone()}, "has, unknown here, 1 tensors"),
        ({"prompt_embeddings": good * float("nan")}, "nan|NaN"),
    ):
        save_file(wrong, path)
        fresh = several()
        names = set(fresh.state_dict())
        with pytest.raises(CheckpointError, match=said):
            fresh.load_adapter(tmp_path / "past", "again")
        assert set(fresh.state_dict()) == names and list(fresh.peft_config) == list(KINDS)


def test_an_encoder_without_a_past_takes_no_prefix() -> None:
    base = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    )
    with pytest.raises(
        ConfigError, match="DistilBertForSequenceClassification takes no past keys and values"
    ):
        peft_dist.get_peft_model(
            base, peft_dist.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
        )


def test_what_a_model_makes_of_its_tokens() -> None:
    """HF PEFT's `get_prompt` and its kin."""
    for name in ("prompt", "p-tuning", "multitask", "cpt"):
        ours, theirs = make(name, peft_dist), make(name, peft)
        mine = dict(ours.named_parameters())
        with torch.no_grad():
            for key, p in theirs.named_parameters():
                if key.startswith("prompt_encoder"):
                    mine[key].copy_(p)
        more = {"task_ids": torch.tensor([1, 2])} if name == "multitask" else {}
        torch.testing.assert_close(ours.get_prompt(2, **more), theirs.get_prompt(2, **more))
        torch.testing.assert_close(
            ours.get_prompt_embedding_to_save("default"), theirs.get_prompt_embedding_to_save("default")
        )
        assert torch.equal(ours.prompt_tokens["default"], theirs.prompt_tokens["default"])
        assert ours.word_embeddings is ours.get_input_embeddings()


def test_copies_and_dtypes() -> None:
    model = several()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert not torch.allclose(twin(IDS).logits, model(IDS).logits)
    half = peft_dist.get_peft_model(bases.llama().bfloat16(), config("past"))
    theirs = peft.get_peft_model(
        bases.llama().bfloat16(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with torch.no_grad():
        half.prompt_encoder["default"].embedding.weight.copy_(
            theirs.prompt_encoder["default"].embedding.weight
        )
    assert half.prompt_encoder["default"].embedding.weight.dtype == torch.float32
    mine, other = half.eval()(IDS).logits, theirs.eval()(IDS).logits
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine, other, rtol=2**-6, atol=2**-6)
