"""HF PEFT as the oracle: what one library saves the other loads, with equal logits and gradients.

fp32, two layers: the libraries add the same terms in another order, so logits agree to 1e-5 and gradients to
2e-5 of their largest entry.
"""

from __future__ import annotations

import copy
import importlib
import json
import pkgutil
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

import peft_dist
from tests.contract import bases, methods
from tests.contract.case import Parity

PARITY: dict[str, Parity] = {
    label: parity
    for found in sorted(pkgutil.iter_modules(methods.__path__), key=lambda module: module.name)
    for label, parity in importlib.import_module(f"{methods.__name__}.{found.name}").PARITY.items()
}
CASES = {
    label: (getattr(bases, parity.base), parity.config, parity.values) for label, parity in PARITY.items()
}
# More arguments of the forward, and trained tensors whose gradient HF PEFT gets wrong (docs/differences.md).
FORWARD = {
    label: {key: torch.tensor(value) for key, value in (parity.forward or {}).items()}
    for label, parity in PARITY.items()
}
WRONG = {label: parity.wrong_gradients for label, parity in PARITY.items()}
llama = bases.llama
LORA = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
# HF PEFT loads no prompt to train: test_prompt_parity.py has its own way.
each = pytest.mark.parametrize(
    "name", [n for n, (_, config, _) in CASES.items() if not getattr(peft_dist, config).is_prompt_learning]
)


def batch(base, name: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 64, (3, 7), generator=generator)
    labels = torch.tensor([0, 2, 1]) if hasattr(base, "score") else ids
    more = FORWARD.get(name, {})
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **more}


def disturb(model) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)


def gradients(model, tensors, name: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch(model.get_base_model(), name)).loss.backward()
    return {key: p.grad for key, p in tensors.items() if p.requires_grad}


def theirs_by_key(model: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """HF PEFT's Parameters by their names in a checkpoint."""
    values = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = name.replace(".modules_to_save.default.", ".").replace(".default", "")
            key = key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            if key.endswith(".vblora_vector_bank"):
                key = "base_model.vblora_vector_bank"
            values["prompt_embeddings" if key.startswith("prompt_encoder") else key] = p
    return values


def compare(ours: peft_dist.PeftModel, theirs: peft.PeftModel, trainable: bool, name: str) -> None:
    inputs = batch(ours.get_base_model(), name)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)
    if not trainable:
        return
    theirs_tensors = theirs_by_key(theirs)
    mine = gradients(ours, ours.adapter_tensors(), name)
    others = gradients(theirs, theirs_tensors, name)
    assert mine.keys() == others.keys()
    for key, gradient in mine.items():
        if key.endswith(WRONG[name]):
            continue
        size = others[key].abs().max().item() + 1e-8
        assert (gradient - others[key]).abs().max().item() <= 2e-5 * max(size, 1e-3), key


@each
def test_they_load_what_we_save(name, tmp_path) -> None:
    make, config, values = CASES[name]
    ours = peft_dist.get_peft_model(make(), getattr(peft_dist, config)(**values))
    disturb(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    assert type(theirs).__name__ == type(ours).__name__
    compare(ours, theirs, True, name)


@each
def test_we_load_what_they_save(name, tmp_path) -> None:
    make, config, values = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), getattr(peft, config)(**values))
        disturb(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
    ours = peft_dist.PeftModel.from_pretrained(make(), tmp_path / "theirs", is_trainable=True)
    # Before a forward, which may project tensors.
    ours.save_pretrained(tmp_path / "ours")
    compare(ours, theirs, True, name)
    mine, others = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    own = {key for key in mine if any(part in key for part in PARITY[name].own_tensors)}
    assert mine.keys() - own == others.keys()
    for key, value in others.items():
        assert torch.equal(mine[key], value), key
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for key, value in configs[0].items():
        if key not in ("peft_version", "target_modules", "modules_to_save", "auto_mapping"):
            assert value == configs[1][key], key


def test_counts_are_theirs(capsys) -> None:
    for name in ("lora", "lora on an embedding", "ia3", "prompt", "lora with a head", "lora classifier"):
        make, config, values = CASES[name]
        ours = peft_dist.get_peft_model(make(), getattr(peft_dist, config)(**values))
        ours.print_trainable_parameters()
        mine = capsys.readouterr().out
        peft.get_peft_model(make(), getattr(peft, config)(**values)).print_trainable_parameters()
        assert mine == capsys.readouterr().out, name


def test_names_of_parameters_are_theirs() -> None:
    for name in ("lora", "lora on an embedding", "ia3", "lora with a head"):
        make, config, values = CASES[name]
        ours = peft_dist.get_peft_model(make(), getattr(peft_dist, config)(**values))
        theirs = peft.get_peft_model(make(), getattr(peft, config)(**values))
        trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
        assert trained[0] == trained[1], name


@pytest.mark.parametrize("name", ["lora", "ia3", "prompt", "prompt on GPT-2"])
def test_generation_is_theirs(name, tmp_path) -> None:
    make, config, values = CASES[name]
    ours = peft_dist.get_peft_model(make(), getattr(peft_dist, config)(**values)).eval()
    disturb(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    ids = torch.randint(2, 64, (2, 5), generator=torch.Generator().manual_seed(5))
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    for more in ({"max_new_tokens": 6}, {"max_length": 9}, {"num_beams": 2, "max_new_tokens": 4}):
        assert torch.equal(
            ours.generate(input_ids=ids, **how, **more), theirs.generate(input_ids=ids, **how, **more)
        )


def test_a_half_precision_base_keeps_fp32_adapters() -> None:
    ours = peft_dist.get_peft_model(llama().bfloat16(), peft_dist.LoraConfig(**LORA))
    theirs = peft.get_peft_model(llama().bfloat16(), peft.LoraConfig(**LORA))
    disturb(theirs)
    with torch.no_grad():
        for key, p in ours.adapter_tensors().items():
            p.copy_(theirs_by_key(theirs)[key])
            assert p.dtype == torch.float32
    inputs = batch(ours.get_base_model())
    mine, others = ours(**inputs).logits, theirs(**inputs).logits
    assert mine.dtype == others.dtype == torch.bfloat16
    # Both round what leaves a layer to bf16 once; two bf16 steps of the largest logit.
    assert (mine - others).abs().max() <= 2**-7 * others.abs().max()


def test_unsupported_fields_are_refused_by_name(tmp_path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**LORA, alora_invocation_tokens=[1]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        peft_dist.PeftDistError,
        match=r"LoraConfig.alora_invocation_tokens: \[1\] is not supported; only None is",
    ):
        peft_dist.PeftModel.from_pretrained(llama(), tmp_path)


def test_copies_are_independent() -> None:
    ours = peft_dist.get_peft_model(llama(), peft_dist.LoraConfig(**LORA))
    disturb(ours)
    twin = copy.deepcopy(ours)
    inputs = batch(ours.get_base_model())
    before = ours(**inputs).logits
    disturb(twin)
    assert torch.equal(ours(**inputs).logits, before)
    assert not torch.equal(twin(**inputs).logits, before)
