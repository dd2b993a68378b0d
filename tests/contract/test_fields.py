"""Nothing in a config is without effect: a walk over every field of every config of the catalog.

Each field has a case in which changing it changes an output, a checkpoint or an error. Fields that configs share
have theirs here, once for all methods; a method's own are in the `FIELDS` of its file: a `Field`, several, or a
function that shows the effect itself. `FIELD_BASE` there are the values that all its cases share.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import pkgutil
import warnings
from collections.abc import Callable

import pytest
import torch

import peft_dist
from peft_dist.catalog import METHODS, config_class
from peft_dist.config import PeftConfig
from peft_dist.errors import PeftDistError
from tests.contract import bases, methods
from tests.contract.case import Field

FILES = {
    module.CASES[0].method: module
    for found in pkgutil.iter_modules(methods.__path__)
    if (module := importlib.import_module(f"{methods.__name__}.{found.name}")).CASES
}


def base_values(name: str) -> dict:
    """The fields that the method's cases share."""
    own = getattr(FILES.get(name), "FIELD_BASE", None)
    if own is not None:
        return dict(own)
    if config_class(name).is_prompt_learning:
        return {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    return {"target_modules": ["q_proj", "v_proj"]} if has(name, "target_modules") else {}


def has(name: str, field: str) -> bool:
    return field in {f.name for f in dataclasses.fields(config_class(name))}


def made(name: str, base: str = "llama", **values):
    torch.manual_seed(0)
    return peft_dist.get_peft_model(getattr(bases, base)(), config_class(name)(**values))


def batch(model, forward: dict) -> dict:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 64, (3, 7), generator=generator)
    labels = torch.tensor([0, 2, 1]) if hasattr(model.get_base_model(), "score") else ids
    given = {key: torch.tensor(value) for key, value in forward.items()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **given}


def fill(model) -> None:
    """The same values for tensors of one name and shape, whatever the config."""
    with torch.no_grad():
        for key, tensor in model.adapter_tensors().items():
            if tensor.is_floating_point() and tensor.requires_grad:
                seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
                noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
                tensor.add_(0.2 * noise.to(tensor.dtype))


def seen(name: str, what: str, case: Field, values: dict):
    """What `case.changes` looks at, as something to compare."""
    model = made(name, case.base, **values)
    tensors = peft_dist.get_peft_model_state_dict(model)
    if what == "tensors":
        return {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}
    if what == "trained":
        return {key for key, p in model.named_parameters() if p.requires_grad}
    if what == "saved":
        return model.peft_config["default"].to_dict()
    if what == "start":
        return {key: t.clone() for key, t in tensors.items()}
    fill(model)
    model.train(what != "output")
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = model(**batch(model, case.forward))
    if what == "gradient":
        outputs.loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return outputs.loss if what == "loss" else outputs.logits


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def check(name: str, field: str, case: Field) -> None:
    values = {**base_values(name), **case.given}
    values.pop(field, None)
    if case.changes == "error":
        with pytest.raises((PeftDistError, ValueError, TypeError), match=field):
            made(name, case.base, **values, **{field: case.value})
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        without = seen(name, case.changes, case, values)
        again = seen(name, case.changes, case, values)
        changed = seen(name, case.changes, case, {**values, field: case.value})
    assert same(without, again), f"{name}.{field}: {case.changes} is not reproducible"
    if case.changes == "saved":
        changed.pop(field), without.pop(field)
    assert not same(without, changed), f"{name}.{field}: {case.value!r} changes no {case.changes}"


# Fields that configs share


def task_type(name: str, tmp_path) -> None:
    values = base_values(name) | {"task_type": "CAUSAL_LM"}
    assert type(made(name, **values)) is peft_dist.PeftModelForCausalLM
    del values["task_type"]
    if config_class(name).is_prompt_learning:
        with pytest.raises(KeyError, match="task_type"):
            made(name, **values)
    else:
        assert type(made(name, **values)) is peft_dist.PeftModel


def peft_type(name: str, tmp_path) -> None:
    values = base_values(name)
    config = PeftConfig.from_dict({**values, "peft_type": name})
    assert type(config) is config_class(name) and config.peft_type == name
    with pytest.raises(PeftDistError, match="is not a method"):
        PeftConfig.from_dict({**values, "peft_type": f"{name}S"})


def auto_mapping(name: str, tmp_path) -> None:
    """Without it an adapter without a task finds no base."""
    config = config_class(name)(**base_values(name))
    config.task_type, config.base_model_name_or_path = None, str(saved_base(tmp_path))
    config.auto_mapping = {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    assert type(peft_dist.auto.base_of(config)).__name__ == "LlamaForCausalLM"
    config.auto_mapping = None
    with pytest.raises(PeftDistError, match="auto_mapping"):
        peft_dist.auto.base_of(config)


def saved_base(tmp_path):
    bases.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def peft_version(name: str, tmp_path) -> None:
    """Which version's reader is meant is in the file."""
    config_class(name)(**base_values(name)).save_pretrained(tmp_path / "new")
    config_class(name)(**base_values(name), peft_version="0.5.0").save_pretrained(tmp_path / "old")
    files = [json.loads((tmp_path / age / "adapter_config.json").read_text()) for age in ("new", "old")]
    assert [file["peft_version"] for file in files] == ["0.21.2", "0.5.0"]
    assert PeftConfig.from_pretrained(tmp_path / "old").peft_version == "0.5.0"


def base_model_name_or_path(name: str, tmp_path) -> None:
    with pytest.warns(UserWarning, match="base_model_name_or_path.*'elsewhere'"):
        made(name, **base_values(name), base_model_name_or_path="elsewhere")


def revision(name: str, tmp_path) -> None:
    config = config_class(name)(**base_values(name), revision="v1")
    with pytest.warns(UserWarning, match="revision 'v1'.*'v2'"):
        model = peft_dist.get_peft_model(bases.llama(), config, revision="v2")
    assert model.peft_config["default"].revision == "v2"


def inference_mode(name: str, tmp_path) -> None:
    def trained(model) -> bool:
        return any(p.requires_grad for p in model.parameters())

    assert trained(made(name, **base_values(name)))
    assert not trained(made(name, **base_values(name), inference_mode=True))


def target_modules(name: str, tmp_path) -> None:
    check(name, "target_modules", Field(["k_proj"], "tensors", {"target_modules": None}))


def exclude_modules(name: str, tmp_path) -> None:
    check(name, "exclude_modules", Field(["layers.0.self_attn.q_proj"], "tensors"))


def layers_to_transform(name: str, tmp_path) -> None:
    check(name, "layers_to_transform", Field([1], "tensors"))


def layers_pattern(name: str, tmp_path) -> None:
    check(name, "layers_pattern", Field("layers", "error"))


def modules_to_save(name: str, tmp_path) -> None:
    check(name, "modules_to_save", Field(["lm_head"], "tensors"))


def bias(name: str, tmp_path) -> None:
    check(name, "bias", Field("all", "trained"))
    check(name, "bias", Field(f"{name.lower()}_only", "trained"))
    check(name, "bias", Field("some", "error"))


def fan_in_fan_out(name: str, tmp_path) -> None:
    """The layer knows how it stores its weight; a config that says otherwise is put right."""
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = made(name, **base_values(name), fan_in_fan_out=True)
    assert model.peft_config["default"].fan_in_fan_out is False


COMMON: dict[str, Callable] = {
    f.__name__: f
    for f in (
        task_type,
        peft_type,
        auto_mapping,
        peft_version,
        base_model_name_or_path,
        revision,
        inference_mode,
        target_modules,
        exclude_modules,
        layers_to_transform,
        layers_pattern,
        modules_to_save,
        bias,
        fan_in_fan_out,
    )
}


WALK = [(name, f.name) for name in METHODS for f in dataclasses.fields(config_class(name))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "field"), WALK, ids=[f"{name}-{field}" for name, field in WALK])
def test_every_field_has_an_effect(name, field, tmp_path) -> None:
    cases = getattr(FILES.get(name), "FIELDS", {}).get(field)
    if cases is None:
        assert field in COMMON, f"{name}.{field}: no case shows what changing it does (FIELDS of its file)"
        COMMON[field](name, tmp_path)
        return
    for case in cases if isinstance(cases, tuple) else (cases,):
        if isinstance(case, Field):
            check(name, field, case)
        else:
            case(tmp_path) if inspect.signature(case).parameters else case()


def test_no_case_is_of_a_field_that_is_not() -> None:
    for name, module in FILES.items():
        assert not set(getattr(module, "FIELDS", {})) - {
            f.name for f in dataclasses.fields(config_class(name))
        }


def test_the_walk_fails_where_a_case_is_missing_or_shows_nothing(tmp_path) -> None:
    with pytest.raises(AssertionError, match="changes no output"):
        check("LORA", "revision", Field("v3", "output"))
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        check("LORA", "r", Field(3, "error"))
