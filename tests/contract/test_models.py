"""Every method of the catalog in a whole model: what a user does with it, beside the same model without adapters.

float64, so equalities hold to rounding: two layers amplify it to some 1e-10 relative. Experts run in fp32, where that
is some 1e-4 of a gradient.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil

import pytest
import torch
from torch import Tensor

import peft_dist
from peft_dist.catalog import METHODS
from peft_dist.errors import PeftDistError
from peft_dist.rows import BASE
from tests.contract import bases, methods
from tests.contract.case import Parity

PARITY: dict[str, Parity] = {
    label: parity
    for found in sorted(pkgutil.iter_modules(methods.__path__), key=lambda module: module.name)
    for module in (importlib.import_module(f"{methods.__name__}.{found.name}"),)
    # What HF PEFT does not have stands apart.
    for label, parity in {**module.PARITY, **getattr(module, "MODELS", {})}.items()
}
each = pytest.mark.parametrize("label", PARITY)
pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = 4


def config(label: str) -> peft_dist.PeftConfig:
    parity = PARITY[label]
    return getattr(peft_dist, parity.config)(**copy.deepcopy(parity.values))


def base(label: str, device: str = "cpu") -> torch.nn.Module:
    with torch.device(device):
        # Torch has no grouped product of float64, by which experts run.
        made = getattr(bases, PARITY[label].base)()
        return made if PARITY[label].base in ("mixtral", "qwen2_moe") else made.double()


def given(label: str, model: torch.nn.Module, rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 60, (rows, 7), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.flip(1)
    for name, value in (PARITY[label].forward or {}).items():
        inputs[name] = torch.tensor(value)[:1].expand(rows, *torch.tensor(value).shape[1:])
    return inputs


def logits(model: torch.nn.Module, inputs: dict[str, Tensor], **more) -> Tensor:
    """What the batch's own positions get, virtual ones left out."""
    outputs = model(**inputs, **more)
    found = outputs.logits if "logits" in outputs else outputs[0]
    return found[:, -7:]


def disturb(model: peft_dist.PeftModel, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.adapter_tensors(name).values():
            if tensor.is_floating_point() and tensor.requires_grad:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.double))


def trained_model(label: str) -> peft_dist.PeftModel:
    model = peft_dist.get_peft_model(base(label), config(label))
    disturb(model, "default", 5)
    return model.eval()


def close(got: Tensor, wanted: Tensor) -> None:
    within = 1e-9 if wanted.dtype == torch.double else 2e-4
    torch.testing.assert_close(got, wanted, rtol=within, atol=within)


def test_every_method_is_here() -> None:
    """X-LoRA, which is made of saved adapters, has tests of its own: tests/peft_dist/test_xlora.py."""
    configs = {peft_dist.PEFT_TYPE_TO_CONFIG_MAPPING[name].__name__ for name in METHODS}
    assert configs - {"XLoraConfig"} == {parity.config for parity in PARITY.values()}


@each
def test_disabling_and_deleting_give_the_base(label) -> None:
    plain = base(label).eval()
    inputs = given(label, plain)
    asked = {key: value for key, value in inputs.items() if key not in (PARITY[label].forward or {})}
    wanted, names = logits(plain, asked), set(plain.state_dict())
    model = trained_model(label)
    assert (logits(model, inputs) - wanted).abs().max() > 1e-6
    with model.disable_adapter():
        close(logits(model, inputs), wanted)
    model.delete_adapter("default")
    close(logits(model, asked), wanted)
    assert set(model.get_base_model().state_dict()) == names


@each
def test_saved_and_loaded_it_says_the_same(label, tmp_path) -> None:
    model = trained_model(label)
    inputs = given(label, model.get_base_model())
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = peft_dist.PeftModel.from_pretrained(base(label), tmp_path, low_cpu_mem_usage=low)
        assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
        # The file holds what a method exports, in the base's precision.
        torch.testing.assert_close(logits(again, inputs), logits(model, inputs), rtol=1e-7, atol=1e-7)
        assert not any(p.requires_grad for p in again.parameters())


@each
def test_on_meta_nothing_gets_memory(label) -> None:
    model = peft_dist.get_peft_model(base(label, "meta"), config(label))
    assert all(p.is_meta for p in model.parameters())
    assert any(p.requires_grad for p in model.parameters())
    low = peft_dist.get_peft_model(base(label), config(label), low_cpu_mem_usage=True)
    assert all(p.is_meta for p in low.parameters() if p.requires_grad)


@each
def test_merged_it_says_the_same_or_is_refused(label) -> None:
    model = trained_model(label)
    inputs = given(label, model.get_base_model())
    wanted = logits(model, inputs)
    weights = {k: t for k, t in model.get_base_model().state_dict().items() if "default" not in k}
    before = {key: t.clone() for key, t in weights.items()}
    if not METHODS[model.peft_config["default"].peft_type].merges:
        with pytest.raises(PeftDistError, match="cannot be merged"):
            model.merge_adapter()
        return
    model.merge_adapter()
    close(logits(model, inputs), wanted)
    model.unmerge_adapter()
    after = model.get_base_model().state_dict()
    assert all(torch.equal(after[key], t) for key, t in before.items())
    close(logits(model, inputs), wanted)
    merged = model.merge_and_unload()
    close(logits(merged, inputs), wanted)
    assert type(merged) is type(base(label))
    assert not any("default" in key for key in merged.state_dict())


@each
def test_rows_name_adapters_and_each_gets_its_own_gradient(label) -> None:
    """Two adapters of the method, one of another method, and the bare base, in one batch."""
    model = trained_model(label)
    inputs = given(label, model.get_base_model())
    model.add_adapter("second", config(label))
    other = peft_dist.LoraConfig(
        r=2, target_modules="all-linear", task_type=model.peft_config["default"].task_type
    )
    model.add_adapter("lora", other)
    names = ["second", BASE, "default", "lora"]
    for seed, name in enumerate(("default", "second", "lora")):
        model.set_requires_grad(name, True)
        disturb(model, name, seed)
    tensors = [
        (n, k, p) for n in model.peft_config for k, p in model.adapter_tensors(n).items() if p.requires_grad
    ]
    alone, gradients = [], []
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        alone.append(logits(model, one, adapter_names=[name]))
        model.zero_grad()
        if alone[-1].requires_grad:
            alone[-1].square().sum().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for _, _, p in tensors])
    model.zero_grad()
    mixed = logits(model, inputs, adapter_names=names)
    close(mixed, torch.cat(alone))
    mixed.square().sum().backward()
    for i, (name, _, p) in enumerate(tensors):
        # An adapter's gradient comes from its own row alone.
        wanted = gradients[names.index(name)][i]
        got = torch.zeros_like(p) if p.grad is None else p.grad
        close(got, torch.zeros_like(p) if wanted is None else wanted)


@each
def test_copies_are_independent(label) -> None:
    model = trained_model(label)
    inputs = given(label, model.get_base_model())
    wanted = logits(model, inputs)
    twin = copy.deepcopy(model)
    close(logits(twin, inputs), wanted)
    disturb(twin, "default", 11)
    assert torch.equal(logits(model, inputs), wanted)
    assert (logits(twin, inputs) - wanted).abs().max() > 1e-6


@pytest.mark.parametrize(
    "label", [k for k, v in PARITY.items() if v.values.get("task_type") in ("CAUSAL_LM", "SEQ_2_SEQ_LM")]
)
def test_generating_in_a_batch_is_generating_alone(label) -> None:
    model = trained_model(label)
    inputs = given(label, model.get_base_model(), 3)
    inputs.pop("decoder_input_ids", None)
    model.add_adapter("second", config(label))
    disturb(model, "second", 9)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    names = ["second", BASE, "default"]
    mixed = model.generate(**inputs, **how, adapter_names=names)
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        assert torch.equal(model.generate(**one, **how, adapter_names=[name])[0], mixed[row])
