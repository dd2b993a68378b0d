"""Quantised bases made ready, and trained through as HF PEFT does on the same base."""

from __future__ import annotations

import inspect
import itertools

import peft
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import peft_dist
from tests.contract.bases import LLAMA, eight_bit, four_bit

QUANTISED = {
    "8-bit": eight_bit,
    "4-bit": four_bit,
    "4-bit in bf16": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16),
}
CONFIGS = {
    "LoraConfig": {"r": 4, "init_lora_weights": False, "target_modules": "all-linear"},
    "IA3Config": {"init_ia3_weights": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    # bitsandbytes' own repacking, which HF PEFT lets happen, takes whole blocks alone.
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, **sizes})).save_pretrained(path)
    return path


def load(folder, storage: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=QUANTISED[storage](), device_map={"": "cpu"}, dtype=dtype
    )


def train(model, steps: int = 5) -> list[float]:
    """The loss of each step, and the one in eval mode after them."""
    ids = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    return losses


def test_signature_is_hf_pefts() -> None:
    mine, theirs = (
        inspect.signature(library.prepare_model_for_kbit_training).parameters for library in (peft_dist, peft)
    )
    assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize("storage", ["8-bit", "4-bit"])
@pytest.mark.parametrize("config", CONFIGS)
def test_training_is_hf_pefts(folder, tmp_path, capsys, storage, config) -> None:
    """From one saved adapter, on one base. fp32, five steps: sums in another order move a loss by 1e-5 at most;
    in eval mode the 8-bit kernel rounds to 127 steps, which lets a difference in the last bit jump, and under
    HF PEFT bitsandbytes rounds 4-bit scales to bf16: 2e-2."""
    torch.manual_seed(1)
    prepared = peft.prepare_model_for_kbit_training(load(folder, storage))
    made = getattr(peft, config)(**CONFIGS[config], task_type="CAUSAL_LM")
    started = peft.get_peft_model(prepared, made)
    started.save_pretrained(tmp_path)
    losses, lines = {}, {}
    for library in (peft, peft_dist):
        base = library.prepare_model_for_kbit_training(load(folder, storage))
        model = library.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
        capsys.readouterr()
        model.print_trainable_parameters()
        lines[library], losses[library] = capsys.readouterr().out, train(model)
    assert lines[peft] == lines[peft_dist]
    *mine, mine_at_last = losses[peft_dist]
    *theirs, theirs_at_last = losses[peft]
    assert mine == pytest.approx(theirs, abs=1e-5)
    assert mine_at_last == pytest.approx(theirs_at_last, abs=2e-2)
    assert all(after < before for before, after in itertools.pairwise(mine))


def test_what_is_not_quantised_is_fp32_and_frozen(folder) -> None:
    base = load(folder, "4-bit in bf16", torch.bfloat16)
    packed = base.model.layers[0].mlp.up_proj.weight
    stored = packed.data.clone()
    assert base.model.norm.weight.dtype == torch.bfloat16 == packed.dtype
    assert peft_dist.prepare_model_for_kbit_training(base) is base
    assert not any(p.requires_grad for p in base.parameters())
    assert base.model.norm.weight.dtype == base.lm_head.weight.dtype == torch.float32
    assert packed.dtype == torch.bfloat16
    assert torch.equal(packed.data.view(torch.uint8), stored.view(torch.uint8))


def test_checkpointing(folder) -> None:
    ids = torch.randint(1, 64, (1, 4))
    reentrant = peft_dist.prepare_model_for_kbit_training(load(folder, "8-bit"))
    assert reentrant.is_gradient_checkpointing
    assert reentrant.get_input_embeddings()(ids).requires_grad
    own = Bare()
    own.is_loaded_in_8bit = True
    peft_dist.prepare_model_for_kbit_training(own, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert own.settings == {"use_reentrant": False}
    assert not own.embeddings(torch.tensor([1])).requires_grad
    none = peft_dist.prepare_model_for_kbit_training(load(folder, "8-bit"), use_gradient_checkpointing=False)
    assert not none.is_gradient_checkpointing
    plain = peft_dist.prepare_model_for_kbit_training(LlamaForCausalLM(LlamaConfig(**LLAMA)))
    assert not plain.is_gradient_checkpointing


class Bare(nn.Module):
    """A base of another quantisation, without transformers' own hook on its embeddings."""

    quantization_method = "gptq"

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(4, 4, dtype=torch.float16)
        self.settings = None

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None) -> None:
        self.settings = gradient_checkpointing_kwargs


def test_other_quantisations_keep_their_dtypes() -> None:
    base = peft_dist.prepare_model_for_kbit_training(Bare(), gradient_checkpointing_kwargs={"a": 1})
    assert base.embeddings.weight.dtype == torch.float16
    assert base.settings == {"a": 1}
    assert base.embeddings(torch.tensor([1])).requires_grad


def test_old_name() -> None:
    base = LlamaForCausalLM(LlamaConfig(**LLAMA))
    with pytest.warns(FutureWarning) as caught:
        assert peft_dist.prepare_model_for_int8_training(base, use_gradient_checkpointing=False) is base
    assert str(caught[0].message) == (
        "prepare_model_for_int8_training is deprecated. Use prepare_model_for_kbit_training."
    )
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("storage", QUANTISED)
def test_merging_a_whole_model(folder, storage) -> None:
    """Output of the merged model is that of the requantised weights; unmerging gives back the output exactly."""
    ids = torch.randint(1, 64, (2, 6))
    torch.manual_seed(0)
    model = peft_dist.get_peft_model(
        load(folder, storage), peft_dist.LoraConfig(task_type="CAUSAL_LM", **CONFIGS["LoraConfig"])
    ).eval()
    with torch.no_grad():
        before = model(ids).logits
        with model.disable_adapter():
            bare = model(ids).logits
        model.merge_adapter()
        merged = model(ids).logits
        assert (merged - before).abs().max() < (merged - bare).abs().max()
        model.unmerge_adapter()
        assert torch.equal(model(ids).logits, before)
        saved = model.merge_and_unload().state_dict()
    assert any(key.endswith(("SCB", "quant_state.bitsandbytes__nf4", "bitsandbytes__fp4")) for key in saved)


def test_evaluating_in_between_lets_gradients_through(folder) -> None:
    """Also where an adapter sits on other layers than bitsandbytes would repack."""
    model = peft_dist.get_peft_model(
        load(folder, "4-bit"), peft_dist.LoraConfig(r=2, target_modules=["layers.0.self_attn.q_proj"])
    )
    ids = torch.randint(1, 64, (2, 6))
    with torch.no_grad():
        evaluated = model.eval()(ids).logits
    trained = model.train()(ids).logits
    # One kernel for both: only the order of sums may differ.
    torch.testing.assert_close(trained, evaluated)
    trained.sum().backward()
    (tensor,) = (p for name, p in model.named_parameters() if "lora_B" in name)
    assert tensor.grad.abs().sum() > 0
