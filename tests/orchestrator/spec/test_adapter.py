from dataclasses import dataclass, field
from typing import Literal

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import adapter as adapters
from orchestrator.spec.adapter import MethodField, method_fields, method_names, peft_config, resolved_fields
from orchestrator.spec.job import AdapterSpec
from peft_dist.catalog import config_class

from .jobs import NEEDED, refused_after_minimal, spec_of


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{type: loar}", "adapter.type: 'loar' is not a method. Closest: 'lora'. List them: raypeft methods"),
        ("{type: xyzzy}", "adapter.type: 'xyzzy' is not a method. List them: raypeft methods"),
        ("{type: 3}", "adapter.type: 3 is not a method. List them: raypeft methods"),
        ("{lora_dropuot: 1}", "adapter.lora_dropuot: lora has no such field. Closest: 'adapter.lora_dropout'."),
        ("{r: x}", "adapter.r: 'x' is not a whole number. It is rank, at least 1."),
        ("{r: true}", "adapter.r: true is not a whole number. It is rank, at least 1."),
        ("{r: 8.5}", "adapter.r: 8.5 is not a whole number. It is rank, at least 1."),
        ("{r: 0}", "adapter.r: 0; a rank is a whole number of at least 1."),
        ("{r: }", "adapter.r: is empty. Write a value, or remove the key for its default."),
        ("{dropout: 1.5}", "adapter.dropout: 1.5; it lies in [0, 1)."),
        ("{bias: non}", "adapter.bias: 'non' is not one of none, all, lora_only. Closest: 'none'."),
        ("{target_modules: 3}", "adapter.target_modules: 3 is not a list, each text or text. It is names or suffixes "
                                "of layers, one regular expression over whole names, `\"all-linear\"`, or None for the "
                                "architecture's usual ones."),
        ("{base_model_name_or_path: x}", "adapter.base_model_name_or_path: is filled in by itself. Remove it."),
        ("{use_dora: maybe}", "adapter.use_dora: 'maybe' is not true or false."),
        ("{type: prompt_tuning}", "adapter.num_virtual_tokens: is required by prompt_tuning and not given. It is how "
                                  "many, at least 1."),
        ("{type: adalora, target_r: 0}", "adapter.target_r: 0; it is a whole number of at least 1."),
        ("{type: adalora, tinit: 10, total_step: 10}", "adapter.tinit: 10 of 10 steps with tfinal 0 leave none in "
                                                       "which the budget falls."),
        ("{layers_to_transform: [0]}", "adapter.layers_to_transform: cannot be used when `target_modules` is a str. "
         "The default is all-linear: write target_modules as a list, such as [q_proj, v_proj]."),
        ("{type: ia3, r: 8}", "adapter.r: ia3 has no such field."),
    ],
)  # fmt: skip
def test_fields_are_those_of_the_method(section, message):
    found = refused_after_minimal(f"adapter: {section}\n")
    assert found.startswith(f"jobs/x.yaml:3 {message.rstrip('.')}") and len(found.splitlines()) == 1


def test_all_wrong_fields_are_told_together():
    message = refused_after_minimal("adapter:\n  rr: 3\n  lora_alpha: x\n  bias: non\n")
    assert [line.split()[0] for line in message.splitlines()] == [
        "jobs/x.yaml:4",
        "jobs/x.yaml:5",
        "jobs/x.yaml:6",
    ]


def test_peft_config_makes_the_method():
    spec = AdapterSpec(type="lora", r=16, alpha=32, dropout=0.1)
    given = peft_config(spec)
    assert given == {
        "target_modules": "all-linear", "r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    config = config_class("LORA")(**given)
    assert (config.r, config.lora_alpha, config.target_modules) == (16, 32, "all-linear")


def test_our_default_targets_and_peft_s_own():
    assert spec_of("adapter: lora\n").adapter.fields == {}
    assert peft_config(AdapterSpec())["target_modules"] == "all-linear"
    assert peft_config(AdapterSpec(target_modules=["q_proj"]))["target_modules"] == ["q_proj"]
    assert "target_modules" not in peft_config(AdapterSpec(type="prompt_tuning", num_virtual_tokens=4))


def test_peft_config_refuses_with_the_key():
    with pytest.raises(SpecError, match=r"^adapter.rr: lora has no such field. Closest: 'adapter.r'.$"):
        peft_config(AdapterSpec(rr=3))


def test_a_whole_float_is_a_whole_number():
    assert spec_of("adapter: {r: 16.0}\n").adapter.fields["r"] == 16


@pytest.mark.parametrize("kind", method_names())
def test_every_field_of_every_method_has_words_and_a_default_of_its_type(kind):
    for each in method_fields(kind).values():
        assert adapters.accepts(each.annotation, each.default) or each.default in (None, "all-linear")
        assert "." not in each.name and (each.help or each.name.endswith("_kwargs"))


@pytest.mark.parametrize("kind", method_names())
def test_resolved_fields_make_the_same_config(kind):
    spec = AdapterSpec(type=kind, **NEEDED.get(kind, {}))
    resolved = resolved_fields(spec)
    again = {name: value for name, value in resolved.items() if value is not None}
    made = config_class(kind.upper())(**peft_config(spec))
    assert made == config_class(kind.upper())(**peft_config(AdapterSpec(type=kind, **again)))
    assert set(resolved) == set(method_fields(kind))


def test_the_steps_of_a_run_are_filled_in_where_a_method_plans_over_them():
    spec = AdapterSpec(type="adalora")
    assert peft_config(spec, total_steps=30)["total_step"] == 30
    assert resolved_fields(spec)["total_step"] is None
    assert peft_config(AdapterSpec(type="adalora", total_step=7), total_steps=30)["total_step"] == 7


def test_aliases_follow_the_method_s_names():
    assert method_fields("lora")["lora_alpha"].aliases == ("alpha",)
    assert method_fields("ia3")["target_modules"] == MethodField(
        "target_modules",
        method_fields("ia3")["target_modules"].annotation,
        "all-linear",
        method_fields("ia3")["target_modules"].help,
    )


def test_help_comes_from_the_config_s_words(monkeypatch):
    @dataclass
    class Config:
        """A method.

        Args:
            r: the rank,
                over two lines.
            a, b: two at once.
        """

        r: int
        a: Literal["x", "y"] = "x"
        b: list[int] = field(default_factory=list)

    monkeypatch.setattr(adapters, "config_class", lambda kind: Config)
    found = method_fields("lora")
    assert found["r"].help == "the rank, over two lines." and found["b"].help == "two at once."
    assert found["r"].default is adapters.MISSING and found["b"].default == []
