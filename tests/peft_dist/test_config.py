"""Configs: HF PEFT's fields, defaults and rules; the catalog that finds them."""

from __future__ import annotations

import dataclasses
import json

import peft
import pytest

import peft_dist
from peft_dist.catalog import METHODS, config_class, entry
from peft_dist.config import PeftConfig, TargetedConfig
from peft_dist.errors import ConfigError, TargetError
from tests.contract.test_fields import base_values

# BONE is gone from HF PEFT.
THEIRS = [name for name in METHODS if name != "BONE"]


def theirs(name: str) -> type:
    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]


def default(field: dataclasses.Field):
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def fields_of(cls: type) -> list[tuple[str, object]]:
    return [(f.name, default(f)) for f in dataclasses.fields(cls)]


@pytest.mark.parametrize("name", THEIRS)
def test_fields_their_order_and_defaults_are_theirs(name) -> None:
    mine, wanted = fields_of(config_class(name)), fields_of(theirs(name))
    assert [field for field, _ in mine] == [field for field, _ in wanted]
    for (field, value), (_, other) in zip(mine, wanted, strict=True):
        # A default may be an object of a class of each library's own.
        assert getattr(value, "__dict__", value) == getattr(other, "__dict__", other) or value == other, field


def test_the_base_configs_fields_are_theirs() -> None:
    for cls in ("PeftConfig", "PromptLearningConfig"):
        assert fields_of(getattr(peft_dist, cls)) == fields_of(getattr(peft, cls))


@pytest.mark.parametrize("name", THEIRS)
def test_their_file_is_read_and_ours_too(name, tmp_path) -> None:
    values = {"task_type": "CAUSAL_LM", **base_values(name)}
    theirs(name)(**values).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is config_class(name)
    config.save_pretrained(tmp_path / "ours")
    again = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert type(again) is theirs(name)
    assert PeftConfig.from_pretrained(tmp_path / "ours") == config
    assert not list((tmp_path / "ours").glob(".*"))


def test_unknown_fields_of_a_newer_version_warn_and_are_kept(tmp_path) -> None:
    with pytest.warns(UserWarning) as warned:
        config = PeftConfig.from_dict({"peft_type": "LORA", "from_the_future": {"a": [1]}, "r": 3})
    assert [str(w.message) for w in warned] == [
        "LoraConfig: unknown fields from_the_future have no effect here; they are kept when it is saved. A newer "
        "version may have written them."
    ]
    assert config.r == 3 and config.unknown == {"from_the_future": {"a": [1]}}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["from_the_future"] == {"a": [1]}
    with pytest.warns(UserWarning, match="from_the_future"):
        assert PeftConfig.from_pretrained(tmp_path).unknown == config.unknown


def test_what_a_config_says_of_itself(tmp_path) -> None:
    config = peft_dist.LoraConfig(r=3)
    assert config.peft_type is peft_dist.PeftType.LORA and config.peft_version == peft.__version__
    assert not config.is_prompt_learning and not config.is_adaption_prompt
    assert peft_dist.PromptTuningConfig(num_virtual_tokens=2).is_prompt_learning
    assert peft_dist.get_peft_config({"peft_type": "LORA", "r": 3}) == config
    assert PeftConfig.from_peft_type(peft_type="LORA", r=3) == config
    assert peft_dist.LoraConfig.from_peft_type(r=3) == config
    config.save_pretrained(tmp_path / "in" / "here")
    assert PeftConfig.from_json_file(tmp_path / "in/here/adapter_config.json") == config.to_dict()
    assert PeftConfig.from_pretrained(tmp_path / "in", subfolder="here") == config
    assert PeftConfig.from_pretrained(str(tmp_path), "in/here") == config
    config.save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "A", "parent_library": "b"})
    assert PeftConfig.from_pretrained(tmp_path).auto_mapping == {
        "base_model_class": "A",
        "parent_library": "b",
    }
    assert config.auto_mapping is None
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"is a file\. Name a directory\."):
        config.save_pretrained(tmp_path / "file")
    with pytest.raises(TypeError, match=r"unknown arguments: colour\."):
        config.save_pretrained(tmp_path, colour=1)


def test_a_config_from_the_hub(tmp_path, monkeypatch) -> None:
    import huggingface_hub

    peft_dist.LoraConfig(r=3).save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, **how):
        asked.append((repo_id, filename, how))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert PeftConfig.from_pretrained("someone/adapter", revision="v1", token="t").r == 3
    assert PeftConfig.from_pretrained("someone/adapter", subfolder="b", cache_dir="c").r == 3
    assert asked == [
        ("someone/adapter", "adapter_config.json", {"subfolder": None, "revision": "v1", "token": "t"}),
        ("someone/adapter", "adapter_config.json", {"subfolder": "b", "cache_dir": "c"}),
    ]

    def fail(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ConfigError, match=r"'someone/adapter' cannot be read from the hub: no network$"):
        PeftConfig.from_pretrained("someone/adapter")


def test_what_belongs_to_one_run_is_not_in_a_file(tmp_path) -> None:
    values = {"peft_type": "LORA", "runtime_config": {"ephemeral_gpu_offload": True}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="runtime_config is left out"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert "runtime_config" not in config.to_dict()


ERRORS = {
    "rank": (lambda: peft_dist.LoraConfig(r=0), "LoraConfig.r: 0; a rank is a whole number of at least 1."),
    "rank in a pattern": (
        lambda: peft_dist.LoraConfig(rank_pattern={"q": -1}),
        "LoraConfig.rank_pattern['q']: -1; a rank is a whole number of at least 1.",
    ),
    "dropout": (
        lambda: peft_dist.LoraConfig(lora_dropout=1.0),
        "LoraConfig.lora_dropout: 1.0; it lies in [0, 1).",
    ),
    "bias": (
        lambda: peft_dist.LoraConfig(bias="some"),
        "LoraConfig.bias: 'some' is not one of none, all, lora_only.",
    ),
    "layers of a regex": (
        lambda: peft_dist.LoraConfig(target_modules="x", layers_to_transform=[1]),
        "LoraConfig.layers_to_transform: cannot be used when `target_modules` is a str.",
    ),
    "pattern of a regex": (
        lambda: peft_dist.LoraConfig(target_modules="x", layers_pattern="h"),
        "LoraConfig.layers_pattern: cannot be used when `target_modules` is a str.",
    ),
    "pattern alone": (
        lambda: peft_dist.LoraConfig(layers_pattern="h"),
        "LoraConfig.layers_pattern: `layers_to_transform` must be given with it.",
    ),
    "task": (
        lambda: peft_dist.LoraConfig(task_type="CAUSAL"),
        "task_type: 'CAUSAL' is not one of SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM, TOKEN_CLS, QUESTION_ANS, "
        "FEATURE_EXTRACTION. Closest: 'CAUSAL_LM'.",
    ),
    "feedforward": (
        lambda: peft_dist.IA3Config(target_modules=["k"], feedforward_modules=["w"]),
        "IA3Config.feedforward_modules: 'w' is not in target_modules; it must be a subset of them.",
    ),
    "prompt start": (
        lambda: peft_dist.PromptTuningConfig(num_virtual_tokens=1, prompt_tuning_init="X"),
        "PromptTuningConfig.prompt_tuning_init: 'X' is not one of TEXT, RANDOM, SAMPLE_VOCAB.",
    ),
    "no tokenizer": (
        lambda: peft_dist.PromptTuningConfig(num_virtual_tokens=1, prompt_tuning_init="TEXT"),
        "PromptTuningConfig.tokenizer_name_or_path: must be given when prompt_tuning_init is TEXT.",
    ),
    "no text": (
        lambda: peft_dist.PromptTuningConfig(
            num_virtual_tokens=1, prompt_tuning_init="TEXT", tokenizer_name_or_path="x"
        ),
        "PromptTuningConfig.prompt_tuning_init_text: must be given when prompt_tuning_init is TEXT.",
    ),
    "tokenizer's arguments": (
        lambda: peft_dist.PromptTuningConfig(num_virtual_tokens=1, tokenizer_kwargs={"a": 1}),
        "PromptTuningConfig.tokenizer_kwargs: only used when prompt_tuning_init is TEXT.",
    ),
    "method": (lambda: entry("loar"), "'loar' is not a method. Closest: 'lora'."),
}


@pytest.mark.parametrize("name", ERRORS)
def test_rules(name) -> None:
    act, message = ERRORS[name]
    with pytest.raises(ConfigError) as raised:
        act()
    assert str(raised.value) == message


def test_files_that_are_no_config(tmp_path) -> None:
    path = tmp_path / "adapter_config.json"
    for text, why in (
        (None, "no such file"),
        ("{", "is not JSON"),
        ("{}", "has no peft_type"),
        ("[1]", "has no"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=why):
            PeftConfig.from_pretrained(tmp_path)


def test_ia3_cannot_sit_on_an_embedding() -> None:
    import torch

    base = torch.nn.Sequential(torch.nn.Embedding(4, 4))
    with pytest.raises(TargetError) as raised:
        peft_dist.get_peft_model(base, peft_dist.IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert str(raised.value) == (
        "targets: '0' is a Embedding; IA3 sits on conv1d, conv2d, conv3d, linear. Leave it out, or choose "
        "another method for it."
    )
    assert type(base[0]) is torch.nn.Embedding


def test_names_compare_to_strings_and_serialise() -> None:
    assert peft_dist.PeftType.LORA == "LORA" == str(peft_dist.PeftType.LORA)
    assert json.dumps({"t": peft_dist.TaskType.CAUSAL_LM}) == '{"t": "CAUSAL_LM"}'
    assert [task.value for task in peft_dist.TaskType] == [task.value for task in peft.TaskType]
    assert set(METHODS) <= set(peft_dist.PeftType.__members__)
    config = peft_dist.LoraConfig(task_type=peft_dist.TaskType.SEQ_CLS, target_modules={"b", "a"})
    assert config.to_dict()["task_type"] == "SEQ_CLS" and config.to_dict()["target_modules"] == ["a", "b"]


@pytest.mark.parametrize(
    "name", [n for n in THEIRS if issubclass(config_class(n), TargetedConfig) and n != "XLORA"]
)
def test_names_of_layers_are_a_set_as_theirs(name) -> None:
    """Programs compare them with a set; a file has them sorted."""
    given = {"target_modules", "exclude_modules", "feedforward_modules"} & {
        f.name for f in dataclasses.fields(theirs(name))
    }
    values = {field: ["b", "a"] for field in given} | ({"total_step": 10} if name == "ADALORA" else {})
    mine, wanted = config_class(name)(**values), theirs(name)(**values)
    for field in given:
        assert getattr(mine, field) == set(getattr(wanted, field)) == {"a", "b"}
        assert mine.to_dict()[field] == ["a", "b"]


def test_a_dictionary_without_a_method_is_no_config() -> None:
    assert peft_dist.get_peft_config({"peft_type": "LORA", "r": 3}).r == 3
    with pytest.raises(ConfigError, match="peft_type is missing"):
        peft_dist.get_peft_config({"r": 3})


def test_auto_loading_names_the_base(tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **small)).save_pretrained(tmp_path / "base")
    base = peft_dist.load_base(str(tmp_path / "base"))
    model = peft_dist.get_peft_model(base, peft_dist.LoraConfig(task_type="CAUSAL_LM"))
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft_dist.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is peft_dist.PeftModelForCausalLM
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        text.replace(json.dumps(str(tmp_path / "base")), "null")
    )
    with pytest.raises(ConfigError, match="base_model_name_or_path is not given"):
        peft_dist.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
