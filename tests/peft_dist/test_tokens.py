"""What LoRA does beside its layers: rows of embeddings, tied embeddings, replicated layers."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import peft_dist
from peft_dist.errors import ConfigError, PeftDistError, TargetError
from tests.contract import bases

IDS = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(3))
LORA = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
TOKENS = IDS[0, :3].unique().tolist()
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def disturb(model) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def logits(model, **more) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **more).logits


def close(got, wanted, size=1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=size, atol=size)


# Rows


@pytest.mark.parametrize("base", ["llama", "tied_llama"])
def test_rows_train_beside_lora(base, tmp_path) -> None:
    make = getattr(bases, base)
    ours = peft_dist.get_peft_model(make(), peft_dist.LoraConfig(**LORA, trainable_token_indices=TOKENS))
    close(logits(ours), logits(make()), 1e-6)
    assert ours.adapter_tensors()[ROWS].shape == (len(TOKENS), 16)
    ours(input_ids=IDS, labels=IDS).loss.backward()
    assert ours.adapter_tensors()[ROWS].grad.abs().sum() > 0
    disturb(ours)
    wanted = logits(ours)
    ours.save_pretrained(tmp_path)
    for load in (peft_dist.PeftModel.from_pretrained, peft.PeftModel.from_pretrained):
        close(logits(load(make(), tmp_path)), wanted)
    lean = peft_dist.PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=True)
    assert not any(t.is_meta for t in (*lean.parameters(), *lean.buffers()))
    close(logits(lean), wanted)
    ghost = make().to("meta")
    peft_dist.get_peft_model(ghost, peft_dist.LoraConfig(**LORA, trainable_token_indices=TOKENS))
    assert all(p.is_meta for p in ghost.parameters())
    with ours.disable_adapter():
        close(logits(ours), logits(make()), 0)
    merged = ours.merge_and_unload()
    close(logits(merged), wanted)


@pytest.mark.parametrize("base", ["llama", "tied_llama"])
def test_programs_find_the_layers_with_rows_as_in_theirs(base) -> None:
    found = []
    for library, utils in ((peft, peft.utils), (peft_dist, peft_dist.utils)):
        config = library.LoraConfig(**LORA, trainable_token_indices=TOKENS)
        model = library.get_peft_model(getattr(bases, base)(), config).get_base_model()
        kinds = (utils.AuxiliaryTrainingWrapper, utils.TrainableTokensWrapper, utils.ModulesToSaveWrapper)
        modules = (model.model.embed_tokens, model.lm_head, model.model.layers[0].self_attn.q_proj)
        rows = model.model.embed_tokens.token_adapter
        adapters = [module.token_adapter for module in modules if hasattr(module, "token_adapter")]
        found.append(
            (
                [[isinstance(module, kind) for kind in kinds] for module in modules],
                [hasattr(module, "token_adapter") for module in modules],
                {name: list(tokens) for name, tokens in rows.token_indices.items()},
                rows.trainable_tokens_delta["default"].shape,
                list(rows.active_adapters),
                [adapter.trainable_tokens_delta["default"].shape for adapter in adapters],
            )
        )
    assert found[0] == found[1]
    assert any(found[1][1]) and not found[1][1][2]


@pytest.mark.parametrize(
    "config",
    [
        peft_dist.LoraConfig(**LORA, trainable_token_indices=TOKENS),
        peft_dist.TrainableTokensConfig(token_indices=TOKENS),
        peft_dist.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True),
    ],
    ids=["rows beside LoRA", "rows", "one adapter for both"],
)
def test_layers_that_are_changed_alike_stay_tied_when_merged(config) -> None:
    ours = peft_dist.get_peft_model(bases.tied_llama(), copy.deepcopy(config))
    disturb(ours)
    wanted = logits(ours)
    ours.merge_adapter()
    ours.unmerge_adapter()
    merged = ours.merge_and_unload()
    close(logits(merged), wanted)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings


def test_four_layers_of_one_weight_stay_tied_when_merged() -> None:
    facts = T5Config(
        vocab_size=20, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    base, ids = T5ForConditionalGeneration(facts).eval(), torch.arange(5)[None]
    ours = peft_dist.get_peft_model(
        base, peft_dist.LoraConfig(r=2, target_modules=["q"], trainable_token_indices={"shared": [1, 3]})
    )
    disturb(ours)
    wanted = ours(input_ids=ids, decoder_input_ids=ids).logits
    merged = ours.merge_and_unload()
    close(merged(input_ids=ids, decoder_input_ids=ids).logits, wanted)
    towers = (merged.encoder.embed_tokens, merged.decoder.embed_tokens, merged.lm_head)
    assert all(layer.weight is merged.shared.weight for layer in towers) and merged.config.tie_word_embeddings


def test_a_tied_layer_is_of_the_same_kind_as_the_one_with_rows() -> None:
    for library in (peft, peft_dist):
        kinds = (
            library.tuners.trainable_tokens.layer.TrainableTokensLayer,
            library.tuners.tuners_utils.BaseTunerLayer,
        )
        config = library.TrainableTokensConfig(token_indices=TOKENS)
        model = library.get_peft_model(bases.tied_llama(), config).get_base_model()
        assert all(
            isinstance(layer, kind) for layer in (model.model.embed_tokens, model.lm_head) for kind in kinds
        )


def test_rows_differ_per_sequence() -> None:
    ours = peft_dist.get_peft_model(
        bases.tied_llama(), peft_dist.LoraConfig(**LORA, trainable_token_indices=TOKENS), adapter_name="a"
    )
    ours.add_adapter("b", peft_dist.LoraConfig(**LORA, trainable_token_indices=[*TOKENS, 50]))
    ours.set_requires_grad(["a", "b"])
    disturb(ours)
    alone = []
    for row, name in enumerate(["a", "b"]):
        ours.set_adapter(name)
        alone.append(logits(ours)[row])
    alone.append(logits(bases.tied_llama())[2])
    close(logits(ours, adapter_names=["a", "b", "__base__"]), torch.stack(alone))


def test_tied_layers_may_have_rows_of_their_own() -> None:
    rows = {"embed_tokens": [1, 2], "lm_head": [3]}
    config = {**LORA, "trainable_token_indices": rows}
    ours = peft_dist.get_peft_model(bases.tied_llama(), peft_dist.LoraConfig(**config))
    assert ours.adapter_tensors()[ROWS].shape == (2, 16)
    head = ROWS.replace("model.embed_tokens", "lm_head")
    assert ours.adapter_tensors()[head].shape == (1, 16)
    with pytest.raises(
        ConfigError, match=r"model.embed_tokens, lm_head share one weight, and their tokens differ"
    ):
        peft_dist.get_peft_model(bases.tied_llama(), peft_dist.LoraConfig(**config, ensure_weight_tying=True))
    with pytest.raises(ValueError, match="Cannot ensure weight tying"):
        peft.get_peft_model(bases.tied_llama(), peft.LoraConfig(**config, ensure_weight_tying=True))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"trainable_token_indices": []}, ConfigError, r"trainable_token_indices: \[\]; it lists different"),
        ({"trainable_token_indices": {"embed_tokens": [1, 1]}}, ConfigError, r"\['embed_tokens'\]: \[1, 1\]"),
        (
            {"trainable_token_indices": [64]},
            ConfigError,
            "64 is no token of model.embed_tokens, which has 64",
        ),
        ({"trainable_token_indices": {"nowhere": [1]}}, TargetError, "'nowhere' matched no layer"),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            ConfigError,
            "'model.embed_tokens' is among modules_to_save already",
        ),
        (
            {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
            ConfigError,
            "'model.embed_tokens' is among target_modules already",
        ),
        (
            {"ensure_weight_tying": True, "use_dora": True},
            ConfigError,
            "ensure_weight_tying: does not go with",
        ),
    ],
)
def test_refusals_leave_the_model(values, error, message) -> None:
    base = bases.llama()
    with pytest.raises(error, match=message):
        peft_dist.get_peft_model(base, peft_dist.LoraConfig(**{**LORA, **values}))
    assert not any(
        "lora" in name or "token" in name.replace("embed_tokens", "") for name, _ in base.named_parameters()
    )


# Tied embeddings


@pytest.mark.parametrize(
    "targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], r".*(embed_tokens|q_proj)"]
)
def test_tied_embeddings_have_one_adapter(targets, tmp_path) -> None:
    config = {**LORA, "target_modules": targets, "ensure_weight_tying": True}
    ours = peft_dist.get_peft_model(bases.tied_llama(), peft_dist.LoraConfig(**config))
    keys = set(ours.adapter_tensors())
    assert {key.split(".model.", 1)[1] for key in keys if "q_proj" not in key} == {
        "model.embed_tokens.lora_embedding_A",
        "model.embed_tokens.lora_embedding_B",
    }
    disturb(ours)
    wanted = logits(ours)
    base = ours.get_base_model()
    embedding, head = base.model.embed_tokens.change(["default"])[0], base.lm_head.change(["default"])[0]
    close(head, embedding.T)
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(bases.tied_llama(), tmp_path)
    close(logits(theirs), wanted)
    close(logits(peft_dist.PeftModel.from_pretrained(bases.tied_llama(), tmp_path)), wanted)
    merged = ours.merge_and_unload()
    close(logits(merged), wanted)


def test_tied_adapters_of_theirs_load(tmp_path) -> None:
    config = {**LORA, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    theirs = peft.get_peft_model(bases.tied_llama(), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            # The head's are views of the embedding's.
            if p.requires_grad and "lm_head" not in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    theirs.save_pretrained(tmp_path)
    close(logits(peft_dist.PeftModel.from_pretrained(bases.tied_llama(), tmp_path)), logits(theirs))


def test_a_tied_adapter_learns_from_both_layers() -> None:
    """HF PEFT's head has Parameters of its own over the same memory, so each gets a part of the gradient."""
    config = {**LORA, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    ours = peft_dist.get_peft_model(bases.tied_llama(), peft_dist.LoraConfig(**config))
    theirs = peft.get_peft_model(bases.tied_llama(), peft.LoraConfig(**config))
    A, B = ours.adapter_tensors().values()
    module = theirs.get_base_model()
    with torch.no_grad():
        A.normal_(std=0.3), B.normal_(std=0.3)
        module.model.embed_tokens.lora_embedding_A["default"].copy_(A)
        module.model.embed_tokens.lora_embedding_B["default"].copy_(B)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    head = module.lm_head
    for mine, own, others in (
        (A, "lora_embedding_A", head.lora_B["default"].weight),
        (B, "lora_embedding_B", head.lora_A["default"].weight),
    ):
        their_own = getattr(module.model.embed_tokens, own)["default"]
        close(mine.grad, their_own.grad + others.grad.T)
        assert others.grad.abs().max() > 1e-3


def test_a_tied_module_is_trained_as_one(tmp_path) -> None:
    for name in ("embed_tokens", "lm_head"):
        config = {**LORA, "modules_to_save": [name], "ensure_weight_tying": True}
        ours = peft_dist.get_peft_model(bases.tied_llama(), peft_dist.LoraConfig(**config))
        disturb(ours)
        wanted = logits(ours)
        ours.save_pretrained(tmp_path / name)
        close(logits(peft.PeftModel.from_pretrained(bases.tied_llama(), tmp_path / name)), wanted)
        close(logits(peft_dist.PeftModel.from_pretrained(bases.tied_llama(), tmp_path / name)), wanted)
        base = ours.get_base_model()
        x = torch.randn(2, 16)
        own = base.model.embed_tokens.tensors("default")["weight"]
        close(base.lm_head(x), x @ own.T)
        # As losses that read a head's weight do.
        assert base.lm_head.weight is base.model.embed_tokens.weight is own
        with ours.disable_adapter():
            assert base.lm_head.weight is base.model.embed_tokens.weight is not own
        assert base.lm_head.modules_to_save["default"].weight is own
        assert not hasattr(base.model.layers[0].self_attn.q_proj, "modules_to_save")
        merged = ours.merge_and_unload()
        close(logits(merged), wanted)
        assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_tying_without_effect_is_said() -> None:
    tied = {**LORA, "ensure_weight_tying": True}
    with pytest.warns(UserWarning, match="no layer of LlamaForCausalLM shares"):
        peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**tied, target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="on no layer that shares its weight"):
        peft_dist.get_peft_model(bases.tied_llama(), peft_dist.LoraConfig(**tied))


# Replicated layers

REPLICATION = [[0, 2], [1, 2], [0, 1]]


def replicated(library, base="llama", **more):
    config = library.LoraConfig(**LORA, layer_replication=REPLICATION, **more)
    return library.get_peft_model(getattr(bases, base)(), config)


def test_replicated_layers_share_weights_and_have_adapters_of_their_own(tmp_path) -> None:
    ours, theirs = replicated(peft_dist), replicated(peft)
    layers = ours.get_base_model().model.layers
    assert len(layers) == 4 and ours.get_base_model().config.num_hidden_layers == 4
    mine = [layer.self_attn.q_proj for layer in layers]
    assert mine[1].base_layer.weight is mine[2].base_layer.weight
    assert mine[1].tensors("default")["A"] is not mine[2].tensors("default")["A"]
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    close(logits(ours), logits(theirs))
    disturb(ours)
    ours.save_pretrained(tmp_path)
    wanted = logits(ours)
    close(logits(peft.PeftModel.from_pretrained(bases.llama(), tmp_path)), wanted)
    again = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path)
    close(logits(again), wanted)
    assert again.peft_config["default"].layer_replication == REPLICATION
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    close(logits(peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "theirs")), logits(theirs))
    # The cache has a place for each of the four layers.
    grown = ours.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)
    slow = ours.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(grown, slow)


@pytest.mark.parametrize("biases", [{"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}])
def test_replicated_layers_share_no_merged_bias(biases) -> None:
    ours = replicated(peft_dist, **biases)
    disturb(ours)
    wanted = logits(ours)
    mine = [layer.self_attn.q_proj.base_layer for layer in ours.get_base_model().model.layers]
    ours.merge_adapter()
    close(logits(ours), wanted)
    assert mine[1].bias is not mine[2].bias
    ours.unmerge_adapter()
    assert torch.equal(logits(ours), wanted)
    assert mine[1].bias is mine[2].bias
    close(logits(ours.merge_and_unload()), wanted)


def test_replicated_layers_on_other_bases_and_meta() -> None:
    config = {"r": 2, "target_modules": ["query"], "layer_replication": REPLICATION}
    models = [
        library.get_peft_model(bases.bert(), library.LoraConfig(**config)).eval()
        for library in (peft_dist, peft)
    ]
    with torch.no_grad():
        close(*(model(input_ids=IDS)[0] for model in models))
    # HF PEFT finds no layers here.
    assert len(replicated(peft_dist, "gpt2").get_base_model().transformer.h) == 4
    ghost = peft_dist.get_peft_model(
        bases.llama().to("meta"), peft_dist.LoraConfig(**LORA, layer_replication=REPLICATION)
    )
    assert all(p.is_meta for p in ghost.parameters())
    assert len(ghost.get_base_model().model.layers) == 4


def test_replication_is_the_first_adapters_alone() -> None:
    ours = replicated(peft_dist)
    again = peft_dist.LoraConfig(**LORA, layer_replication=REPLICATION)
    ours.add_adapter("same", copy.deepcopy(again))
    assert len(ours.get_base_model().model.layers) == 4
    with pytest.raises(ConfigError, match=r"layer_replication: \[\[0, 1\]\]; .* is made of"):
        ours.add_adapter("other", peft_dist.LoraConfig(**LORA, layer_replication=[[0, 1]]))
    plain = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**LORA))
    with pytest.raises(ConfigError, match="adapters sit on its layers already"):
        plain.add_adapter("late", again)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[0, 3]], r"\[0, 3\] is no range within the base's 2 layers"),
        ([[1, 1]], r"\[1, 1\] is no range"),
        ([], "layer_replication: \\[\\]; it lists ranges"),
        ([[0]], "layer_replication: \\[\\[0\\]\\]; it lists ranges"),
    ],
)
def test_ranges_that_do_not_fit(value, message) -> None:
    base = bases.llama()
    with pytest.raises(PeftDistError, match=message):
        peft_dist.get_peft_model(base, peft_dist.LoraConfig(**LORA, layer_replication=value))
    assert len(base.model.layers) == 2
    with pytest.raises(ConfigError, match="has no list of decoder layers"):
        peft_dist.get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(4, 4)),
            peft_dist.LoraConfig(r=2, target_modules=["0"], layer_replication=[[0, 1]]),
        )
