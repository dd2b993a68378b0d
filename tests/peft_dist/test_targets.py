"""Which layers a config means; HF PEFT's own resolution is the oracle where it has one."""

from __future__ import annotations

import dataclasses
import warnings

import peft
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import peft_dist
from peft_dist.errors import TargetError
from peft_dist.inject import facts_of, places
from peft_dist.targets import DEFAULT_FEEDFORWARD, DEFAULT_TARGETS, by_pattern, ends_in, resolve

SIZES = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def llama() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES))


def resolved(model=None, **values) -> list[str]:
    model = model or llama()
    return resolve(peft_dist.LoraConfig(**values), facts_of(model, places(model)))


def theirs(**values) -> list[str]:
    model = peft.get_peft_model(llama(), peft.LoraConfig(**values), low_cpu_mem_usage=True)
    return [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    ]


CASES = {
    "suffixes": {"target_modules": ["q_proj", "mlp.up_proj"]},
    "whole name": {"target_modules": ["model.layers.3.self_attn.q_proj"]},
    "regex": {"target_modules": r"model\.layers\.(1|11)\..*(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "ALL-LINEAR": {"target_modules": "ALL-LINEAR"},
    "none": {},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "k_proj"]},
    "excluded by regex": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.[1-9]\..*"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 11]},
    "one layer": {
        "target_modules": ["q_proj"],
        "layers_to_transform": 1,
        "layers_pattern": ["blocks", "layers"],
    },
    "saved": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("name", CASES)
def test_as_hf_peft(name) -> None:
    values = CASES[name]
    mine = resolved(**values)
    others = theirs(**values)
    if name.startswith("excluded") and values["target_modules"] == "all-linear":
        # HF PEFT expands first and excludes at injection; so do we.
        others = [n for n in others if not ends_in(values["exclude_modules"], n)]
    assert mine == others


def test_tables_are_theirs() -> None:
    from peft.utils import constants

    known = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {k: v if isinstance(v, str) else list(v) for k, v in DEFAULT_TARGETS["LORA"].items()} == known
    known = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    assert {k: list(v) for k, v in DEFAULT_TARGETS["IA3"].items()} == known
    known = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert {k: list(DEFAULT_FEEDFORWARD[k]) for k in known} == known


def test_heads_of_classifiers_are_left_out() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
    names = resolved(model, target_modules="all-linear", task_type="SEQ_CLS")
    assert "bert.pooler.dense" in names and "classifier" not in names


def test_a_classifier_of_no_task_is_a_layer_as_any() -> None:
    """No task class trains its head, so leaving it out would leave it as it was drawn."""
    for library in (peft, peft_dist):
        with torch.device("meta"):
            sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
            model = ViTForImageClassification(ViTConfig(num_attention_heads=2, image_size=8, **sizes))
        model = library.get_peft_model(model, library.LoraConfig(r=1, target_modules="all-linear"))
        assert "classifier" in model.targeted_module_names


@pytest.mark.parametrize("targets", (["convolution"], "all-linear"), ids=str)
def test_bases_that_have_no_embeddings(targets) -> None:
    """transformers' convolutional models raise where they are asked for their embeddings."""
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}
    found = []
    for library in (peft, peft_dist):
        with torch.device("meta"):
            model = ResNetForImageClassification(ResNetConfig(**sizes))
        model = library.get_peft_model(model, library.LoraConfig(r=1, target_modules=targets))
        found.append(sorted(model.targeted_module_names))
    assert found[0] == found[1] != []


def test_all_linear_is_saved_as_the_ends_of_names() -> None:
    model, config = llama(), peft_dist.LoraConfig(target_modules="all-linear")
    names = resolve(config, facts_of(model, places(model)))
    ends = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert config.target_modules == set(ends.split())
    assert resolve(config, facts_of(model, places(model))) == names


def test_ends_that_mean_more_are_not_used() -> None:
    model = torch.nn.ModuleDict(
        {"a": torch.nn.ModuleDict({"x": torch.nn.Linear(2, 2)}), "x": torch.nn.Embedding(2, 2)}
    )
    config = peft_dist.LoraConfig(target_modules="all-linear")
    assert resolve(config, facts_of(model, places(model))) == ["a.x"] == list(config.target_modules)


def many(kind: str, names: list[str]) -> list[str]:
    """At least 20 of the names of a base's layers."""
    return {
        "two kinds": [name for name in names if name.endswith(("q_proj", "v_proj"))],
        "some layers": [name for name in names if ".layers.1" in name],
        "every second": names[::2],
        "their ends": [name.partition("layers.")[2] for name in names if "self_attn" in name],
        "one that is not there": [
            *(name for name in names if name.endswith(("k_proj", "o_proj"))),
            "a.q_proj",
        ],
    }[kind]


@pytest.mark.parametrize(
    "kind", ["two kinds", "some layers", "every second", "their ends", "one that is not there"]
)
@pytest.mark.filterwarnings("ignore")
def test_a_long_list_is_shortened_as_theirs(kind) -> None:
    found = []
    for library in (peft, peft_dist):
        base = LlamaForCausalLM(LlamaConfig(**SIZES))
        names = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
        targets = many(kind, names)
        assert len(targets) >= 20
        excluded = {"exclude_modules": [targets[0]]}
        config = library.LoraConfig(r=2, target_modules=targets, **excluded)
        model = library.get_peft_model(base, config)
        found.append((set(config.target_modules), sorted(model.targeted_module_names)))
    assert found[0] == found[1]
    assert kind != "two kinds" or found[1][0] == {"q_proj", "v_proj"}


def test_a_long_list_of_ia3_stays() -> None:
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    names = [name for name, _ in base.named_modules() if name.endswith(("k_proj", "down_proj"))]
    down = [name for name in names if name.endswith("down_proj")]
    config = peft_dist.IA3Config(target_modules=names, feedforward_modules=down)
    peft_dist.get_peft_model(base, config)
    assert set(config.target_modules) == set(names) and set(config.feedforward_modules) == set(down)


ERRORS = {
    "similar": (
        {"target_modules": ["v_prj"]},
        "targets: 'v_prj' matched none of 85 linear layers of LlamaForCausalLM. Similar: 'v_proj' (12 "
        "layers)",
    ),
    "several": (
        {"target_modules": ["v_prj", "k_prj"]},
        "targets: 'k_prj', 'v_prj' matched none of 85 linear layers of LlamaForCausalLM. Similar: "
        "'k_proj' (12 layers)",
    ),
    "nothing near": (
        {"target_modules": ["zzz"]},
        "targets: 'zzz' matched none of 85 linear layers of LlamaForCausalLM. There are: 'q_proj', "
        "'k_proj', 'v_proj', "
        "'o_proj', 'gate_proj', 'up_proj', 'down_proj', 'embed_tokens'.",
    ),
    "empty": (
        {"target_modules": []},
        "targets: target_modules is empty; LlamaForCausalLM has 85 linear layers. Name some.",
    ),
    "left out": (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        "targets: 'q_proj' matched none of 85 linear layers of LlamaForCausalLM. exclude_modules, "
        "modules_to_save or "
        "layers_to_transform leave out all they match.",
    ),
    "container": (
        {"target_modules": ["mlp"]},
        "targets: 'model.layers.0.mlp' of LlamaForCausalLM is a container or a layer without a weight "
        "matrix, so no "
        "adapter fits on it. Name the linear, embedding or convolution layers in it.",
    ),
    "saved": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_hed"]},
        "modules_to_save: 'lm_hed' matched no module of LlamaForCausalLM. Similar: 'lm_head'.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_and_the_base_stays(name) -> None:
    values, message = ERRORS[name]
    model = llama()
    before = [n for n, _ in model.named_modules()]
    with pytest.raises(TargetError) as raised:
        peft_dist.get_peft_model(model, peft_dist.LoraConfig(**values))
    assert str(raised.value) == message
    assert [n for n, _ in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_an_unknown_architecture_needs_names() -> None:
    with pytest.raises(TargetError) as raised:
        peft_dist.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft_dist.LoraConfig())
    assert str(raised.value) == (
        "targets: target_modules is not given, and 'Sequential' has no usual ones. Name the layers, or "
        "say 'all-linear'."
    )


def test_what_matches_nothing_beside_what_does_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"'v_prj' matched no layer of LlamaForCausalLM. Similar: 'v_proj'."):
        resolved(target_modules=["q_proj", "v_prj"])
    with pytest.warns(
        UserWarning, match=r"rank_pattern: 'k_proj' matched no adapted layer of LlamaForCausalLM."
    ):
        resolved(target_modules=["q_proj"], rank_pattern={"k_proj": 3})


def test_patterns_match_ends_from_a_dot_on() -> None:
    assert by_pattern({"q_proj": 4}, "model.layers.0.q_proj", 8) == 4
    assert by_pattern({"_proj": 4}, "model.layers.0.q_proj", 8) == 8
    assert by_pattern({r"layers\.\d+\.q_proj": 4}, "model.layers.0.q_proj", 8) == 4
    assert by_pattern({"^q_proj": 4}, "model.q_proj", 8) == 8
    assert by_pattern({"q_proj": 4, "model.q_proj": 2}, "model.q_proj", 8) == 4


def test_usual_targets_are_theirs() -> None:
    """For each method that both libraries have, and each architecture, where a config names no targets."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from peft_dist.catalog import PeftType
    from peft_dist.targets import DEFAULT_FEEDFORWARD, usual_targets

    def plain(table):
        return {name: t if isinstance(t, str) else sorted(t) for name, t in table.items()}

    compared = 0
    for peft_type, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        theirs = getattr(tuner, "target_module_mapping", None)
        if peft_type.value in PeftType.__members__ and theirs:
            assert plain(usual_targets(peft_type.value)) == plain(theirs), peft_type
            compared += 1
    assert compared > 18
    other = peft.utils
    assert plain(usual_targets("IA3")) == plain(other.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING)
    feedforward = other.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert plain(DEFAULT_FEEDFORWARD) == plain(feedforward)


def test_patterns_of_parameters_and_of_learned_ranks_are_no_mistakes() -> None:
    """HF PEFT warns of both that they match no layer, though they have an effect."""
    kinds = {
        "a": torch.nn.Linear(2, 2),
        "b": torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(2, 4, 4))}),
    }
    model = torch.nn.ModuleDict(kinds)
    facts = facts_of(model, places(model))
    facts = dataclasses.replace(facts, parameters=["b.w"])
    given = {"target_modules": ["a"], "target_parameters": ["b.w"], "rank_pattern": {"b.w": 3}}
    ada = peft_dist.AdaLoraConfig(target_modules=["a"], total_step=10)
    ada.rank_pattern = {"a.lora_E": [True, False]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(peft_dist.LoraConfig(**given), facts) == resolve(ada, facts) == ["a"]
    with pytest.warns(RuntimeWarning, match="rank_pattern: 'c' matched no adapted layer"):
        resolve(peft_dist.LoraConfig(target_modules=["a"], rank_pattern={"c": 3}), facts)


def test_biases_that_a_model_reads_past_their_layers_are_refused() -> None:
    config = MambaConfig(vocab_size=9, hidden_size=8, state_size=2, num_hidden_layers=1)
    more = {"r": 2, "target_modules": ["in_proj"], "task_type": "CAUSAL_LM"}
    with pytest.raises(TargetError, match=r"reads the bias of 'backbone.layers.0.mixer.conv1d'"):
        peft_dist.get_peft_model(MambaForCausalLM(config), peft_dist.LoraConfig(bias="all", **more))
    peft_dist.get_peft_model(MambaForCausalLM(config), peft_dist.LoraConfig(bias="lora_only", **more))
