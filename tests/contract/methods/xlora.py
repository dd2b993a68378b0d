"""Its weights come from a whole model's run, so the laws, which run one layer, have no case: see
tests/peft_dist/test_xlora.py."""

from __future__ import annotations

import functools
import json
import tempfile
import warnings

import pytest
import torch

import peft_dist
from peft_dist.errors import PeftDistError
from tests.contract import bases
from tests.contract.case import Case

CASES = (Case("XLORA", "plain", {"hidden_size": 16, "adapters": {"a": "somewhere"}}, ()),)
PARITY: dict = {}

IDS = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(3))


@functools.cache
def _experts() -> dict[str, str]:
    folder = tempfile.mkdtemp(prefix="experts-")
    for number in range(3):
        torch.manual_seed(number)
        config = peft_dist.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        peft_dist.get_peft_model(bases.llama(), config).save_pretrained(f"{folder}/{number}")
    return {str(number): f"{folder}/{number}" for number in range(3)}


def _config(**values):
    return peft_dist.XLoraConfig(
        **{"task_type": "CAUSAL_LM", "hidden_size": 16, "adapters": _experts(), **values}
    )


def _model(**values):
    base = bases.llama()
    base.config.use_cache = False
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft_dist.get_peft_model(base, _config(**values))


def _outputs(training: bool = False, **values) -> torch.Tensor:
    model = _model(**values).train(training)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in model.adapter_tensors().values():
            t.copy_(torch.randn(t.shape, generator=generator))
    torch.manual_seed(2)
    return model(input_ids=IDS).logits


def _output(field: str, value, training: bool = False, **given):
    """Changing the field changes what the model gives."""

    def changes() -> None:
        assert torch.equal(_outputs(training, **given), _outputs(training, **given))
        assert not torch.equal(_outputs(training, **given), _outputs(training, **given, **{field: value}))

    return changes


def _sizes(field: str, value, **given):
    """Changing the field changes the tensors of a checkpoint."""

    def changes() -> None:
        made = [
            {key: t.shape for key, t in _model(**given, **more).adapter_tensors().items()}
            for more in ({}, {field: value})
        ]
        assert made[0] != made[1]

    return changes


def _refused(field: str, value):
    def changes() -> None:
        with pytest.raises(PeftDistError, match=field):
            _model(**{field: value})

    return changes


def _task_type() -> None:
    assert type(_model()) is peft_dist.PeftModelForCausalLM
    assert type(_model(task_type=None)) is peft_dist.PeftModel


def _written(field: str, value):
    """The field is in the file, and read from it."""

    def changes(tmp_path) -> None:
        for name, config in (("a", _config()), ("b", _config(**{field: value}))):
            config.save_pretrained(tmp_path / name)
        files = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab"]
        assert files[0][field] != files[1][field] == value
        assert getattr(peft_dist.PeftConfig.from_pretrained(tmp_path / "b"), field) == value

    return changes


def _auto_mapping(tmp_path) -> None:
    """Without it an adapter without a task finds no base."""
    bases.llama().save_pretrained(tmp_path)
    mapping = {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    config = _config(task_type=None, base_model_name_or_path=str(tmp_path), auto_mapping=mapping)
    assert type(peft_dist.auto.base_of(config)).__name__ == "LlamaForCausalLM"
    config.auto_mapping = None
    with pytest.raises(PeftDistError, match="auto_mapping"):
        peft_dist.auto.base_of(config)


def _base_model_name_or_path() -> None:
    base = bases.llama()
    base.config.use_cache = False
    with pytest.warns(UserWarning, match=r"base_model_name_or_path.*'elsewhere'"):
        peft_dist.get_peft_model(base, _config(base_model_name_or_path="elsewhere"))


def _revision() -> None:
    base = bases.llama()
    base.config.use_cache = False
    with pytest.warns(UserWarning, match=r"revision 'v1'.*'v2'"):
        model = peft_dist.get_peft_model(base, _config(revision="v1"), revision="v2")
    assert model.peft_config["default"].revision == "v2"


def _inference_mode() -> None:
    for mode in (False, True):
        assert any(p.requires_grad for p in _model(inference_mode=mode).parameters()) != mode


def _trained_experts() -> None:
    names = {name for name, p in _model().named_parameters() if p.requires_grad}
    more = {n for n, p in _model(use_trainable_adapters=True).named_parameters() if p.requires_grad}
    assert names < more


def _fewer() -> None:
    fewer = {key: path for key, path in _experts().items() if key != "2"}
    assert _model(adapters=fewer).adapter_tensors().popitem()[1].shape == (2,)
    assert _model().adapter_tensors().popitem()[1].shape == (3,)


FIELDS = {
    "task_type": _task_type,
    "auto_mapping": _auto_mapping,
    "peft_version": _written("peft_version", "0.5.0"),
    "base_model_name_or_path": _base_model_name_or_path,
    "revision": _revision,
    "inference_mode": _inference_mode,
    "hidden_size": _refused("hidden_size", 8),
    "adapters": (_fewer, _refused("adapters", {})),
    "enable_softmax": _output("enable_softmax", False),
    "enable_softmax_topk": _output("enable_softmax_topk", True, enable_softmax=False, top_k_lora=2),
    "layerwise_scalings": _sizes("layerwise_scalings", True),
    "xlora_depth": (_sizes("xlora_depth", 2), _refused("xlora_depth", 0)),
    "xlora_size": _sizes("xlora_size", 4, xlora_depth=2),
    "xlora_dropout_p": (
        _output("xlora_dropout_p", 0.7, training=True, xlora_depth=2),
        _refused("xlora_dropout_p", 1.0),
    ),
    "use_trainable_adapters": _trained_experts,
    "softmax_temperature": (_output("softmax_temperature", 3.0), _refused("softmax_temperature", 0.0)),
    "top_k_lora": (_output("top_k_lora", 1), _refused("top_k_lora", 4)),
    "scaling_pass_value": _output("scaling_pass_value", 0.8),
    "global_scaling_weight": _output("global_scaling_weight", 0.3),
}
