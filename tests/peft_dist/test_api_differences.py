"""Where the API differs from HF PEFT on purpose: both behaviours, side by side."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch

import peft_dist
from peft_dist.errors import TargetError
from peft_dist.targets import UnmatchedWarning
from tests.contract import bases

LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def test_names_of_a_prompt_models_parameters() -> None:
    values = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(bases.llama(), peft.PromptTuningConfig(**values))
    ours = peft_dist.get_peft_model(bases.llama(), peft_dist.PromptTuningConfig(**values))
    names = {name.replace("base_model.model.", "base_model.", 1) for name, _ in ours.named_parameters()}
    assert names == {name for name, _ in theirs.named_parameters()}
    assert peft_dist.get_peft_model_state_dict(ours).keys() == peft.get_peft_model_state_dict(theirs).keys()


def test_whole_modules_are_trained_in_fp32() -> None:
    values = {**LORA, "modules_to_save": ["lm_head"]}
    dtypes = []
    for library, how in ((peft, {}), (peft_dist, {}), (peft_dist, {"autocast_adapter_dtype": False})):
        model = library.get_peft_model(bases.llama().bfloat16(), library.LoraConfig(**values), **how)
        dtypes.append(next(p.dtype for n, p in model.named_parameters() if "modules_to_save" in n))
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_names_that_match_nothing() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lm_hed.*")
        peft.get_peft_model(bases.llama(), peft.LoraConfig(**LORA, modules_to_save=["lm_head", "lm_hed"]))
    with pytest.warns(UnmatchedWarning, match=r"modules_to_save: 'lm_hed' matched no module .* 'lm_head'"):
        peft_dist.get_peft_model(
            bases.llama(), peft_dist.LoraConfig(**LORA, modules_to_save=["lm_head", "lm_hed"])
        )
    with pytest.raises(TargetError, match="'lm_hed' matched no module"):
        peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**LORA, modules_to_save=["lm_hed"]))


def test_adapters_of_two_methods() -> None:
    ids = torch.arange(1, 7).view(1, 6)
    theirs = peft.get_peft_model(bases.llama(), peft.LoraConfig(**LORA))
    with pytest.raises(ValueError):
        theirs.add_adapter("b", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    ours = peft_dist.get_peft_model(
        bases.llama(), peft_dist.LoraConfig(**LORA, init_lora_weights=False)
    ).eval()
    first = ours(ids).logits
    ours.add_adapter(
        "b", peft_dist.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False)
    )
    torch.testing.assert_close(ours(ids).logits, first)
    ours.set_adapter("b")
    assert (ours(ids).logits - first).abs().max() > 1e-4


def test_types_as_strings() -> None:
    assert str(peft.PeftType.LORA) == "PeftType.LORA" and str(peft_dist.PeftType.LORA) == "LORA"
    assert peft_dist.PeftType.LORA == peft.PeftType.LORA == "LORA"
    assert hash(peft_dist.PeftType.LORA) == hash(peft.PeftType.LORA)


def test_names_with_a_dot(tmp_path) -> None:
    with pytest.raises(KeyError):
        peft.get_peft_model(bases.llama(), peft.LoraConfig(**LORA), adapter_name="v1.2")
    ours = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**LORA), adapter_name="v1.2")
    ours.save_pretrained(tmp_path)
    peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "v1.2")


def test_what_was_active_and_is_deleted_is_said() -> None:
    """As HF PEFT says it."""
    said = []
    for library in (peft, peft_dist):
        model = library.get_peft_model(bases.llama(), library.LoraConfig(**LORA))
        model.add_adapter("other", library.LoraConfig(**LORA))
        with pytest.warns(UserWarning, match="which is now deleted") as record:
            model.delete_adapter("default")
        said.append({str(each.message) for each in record if "deleted" in str(each.message)})
    assert said[0] == said[1]


def test_a_name_in_the_prefix_is_said_when_it_is_added() -> None:
    model = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(**LORA))
    with pytest.warns(UserWarning, match="Adapter name 'lora' should not be contained in the prefix 'lora_'"):
        model.add_adapter("lora", peft_dist.LoraConfig(**LORA))


def test_what_can_become_lora() -> None:
    def supports(config) -> bool:
        return peft_dist.get_peft_model(bases.llama(), config).supports_lora_conversion()

    assert supports(peft_dist.LoHaConfig(r=2, target_modules=["q_proj"]))
    assert not supports(peft_dist.LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert not supports(peft_dist.PolyConfig(r=2, n_tasks=2, target_modules=["q_proj"]))
