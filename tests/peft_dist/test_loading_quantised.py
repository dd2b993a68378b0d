"""A base loaded part by part is what transformers loads: parameters, codes, statistics, config, bit for bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, FalconConfig, FalconForCausalLM

import peft_dist
from peft_dist.errors import BaseModelError
from peft_dist.loading import load_base, meta_base
from peft_dist.loading.skeleton import quantisation
from tests import small_bases

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
saved = functools.partial(
    small_bases.saved,
    small_bases.Sizes(
        SIZES,
        middle=112,
        expert=48,
        gpt2={"vocab_size": 96, "n_embd": 64, "n_head": 4, "n_positions": 32},
        t5={"vocab_size": 96, "d_model": 64, "d_ff": 48, "num_heads": 4, "d_kv": 16},
    ),
)


def contents(model: nn.Module) -> dict[str, Any]:
    """Every tensor by name, as bytes since codes may be stored as floats that are no numbers."""
    found: dict[str, Any] = {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[name] = parameter
        found[f"kind of {name}"] = (
            type(parameter),
            parameter.requires_grad,
            parameter.dtype,
            parameter.shape,
        )
        found[f"SCB of {name}"] = getattr(parameter, "SCB", None)
        state = getattr(parameter, "quant_state", None)
        for key, value in (state.as_dict() if state is not None else {}).items():
            found[f"{key} of {name}"] = value
    return {key: as_bytes(value) if isinstance(value, Tensor) else value for key, value in found.items()}


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kind", ["llama", "tied", "mixture", "gpt2", "t5"])
@pytest.mark.parametrize("quantised", [None, "int8", "nf4", "fp4 stored as bf16"])
def test_it_is_what_transformers_loads(kind: str, quantised: str | None, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path, **({"max_shard_size": "40KB"} if kind == "mixture" else {}))
    asked: Any = quantisation(quantised) if quantised in (None, "int8", "nf4") else None
    if quantised == "fp4 stored as bf16":
        asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    more = {} if asked is None else {"quantization_config": asked, "device_map": {"": "cpu"}}
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    for dtype in (torch.float32, torch.bfloat16):
        expected = auto.from_pretrained(folder, dtype=dtype, **more)
        loaded = load_base(folder, task, dtype, asked)
        assert contents(loaded) == contents(expected)
        assert loaded.config.to_dict() == expected.config.to_dict()
        assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
        assert not loaded.training


def test_weights_stored_twice_are_tied_when_they_are_equal_alone(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    apart = load_base(folder)
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight
    state = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    together = load_base(folder)
    assert together.lm_head.weight is together.model.embed_tokens.weight


def test_a_new_head_is_not_quantised_and_is_the_seeds(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    torch.manual_seed(3)
    loaded = load_base(folder, "SEQ_CLS", quantization="nf4", labels=["a", "b", "c"])
    assert type(loaded.score) is nn.Linear and loaded.score.weight.shape == (3, 64)
    torch.manual_seed(3)
    again = load_base(folder, "SEQ_CLS", labels=["a", "b", "c"])
    assert torch.equal(loaded.score.weight, again.score.weight)


@pytest.mark.parametrize("quantised", [None, "int8", "nf4"])
def test_a_meta_base_with_adapters_is_filled(quantised: str | None, tmp_path: Path) -> None:
    folder, ids = saved("tied", tmp_path), torch.arange(12).view(2, 6)
    config = peft_dist.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    empty = meta_base(folder, quantization=quantised)
    assert all(parameter.is_meta for parameter in empty.parameters())
    outputs = []
    for base in (empty, load_base(folder, quantization=quantised)):
        torch.manual_seed(1)
        model = peft_dist.get_peft_model(base, config)
        if base is empty:
            torch.manual_seed(1)
            assert load_base(folder, quantization=quantised, into=model) is model
        assert not any(parameter.is_meta for parameter in model.parameters())
        with model.disable_adapter(), torch.no_grad():
            outputs.append(model(input_ids=ids).logits)
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert torch.equal(*outputs)


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_base(*args, **kwargs)
    return str(caught.value)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    assert refusal(folder, quantization="int4").startswith(
        "load_base: quantization is 'int4'; it is one of int8, nf4, fp4"
    )
    assert "neither load_in_8bit nor load_in_4bit" in refusal(folder, quantization=BitsAndBytesConfig())
    assert "is a dict; bases are quantised by bitsandbytes alone" in refusal(folder, quantization={})
    assert "cannot be quantised from torch.float64" in refusal(folder, dtype="float64", quantization="nf4")
    assert "dtype is 'int32'; it is a floating torch.dtype" in refusal(folder, dtype="int32")
    assert refusal(folder, zero_stage=4) == "load_base: zero_stage is 4; it is 0, 1, 2 or 3."
    full = load_base(folder)
    assert "is on cpu, not on the meta device" in refusal(folder, into=full)
    assert "has no quantised layers" in refusal(folder, quantization="nf4", into=meta_base(folder))


def test_a_base_whose_linear_layers_are_its_own_is_refused(tmp_path: Path) -> None:
    config = FalconConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    said = refusal(str(tmp_path), quantization="nf4")
    assert said.startswith("load_base: no layer of FalconForCausalLM can be quantised: ")
    assert said.endswith(" Its linear layers are FalconLinear, Linear. Leave quantization out.")


def stored(kind: str, quantised: str, folder: Path) -> str:
    """A base saved quantised by transformers, from bf16."""
    asked: Any = quantisation(quantised) if quantised in ("int8", "nf4") else None
    if asked is None:
        asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    base = _auto(kind).from_pretrained(
        saved(kind, folder / "full"),
        dtype=torch.bfloat16,
        quantization_config=asked,
        device_map={"": "cpu"},
    )
    base.save_pretrained(folder / "stored")
    return str(folder / "stored")


def _auto(kind: str) -> Any:
    return transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM


@pytest.mark.parametrize("kind", ["llama", "tied", "mixture", "gpt2", "t5"])
@pytest.mark.parametrize("quantised", ["int8", "nf4", "fp4 stored as bf16"])
def test_a_base_that_is_stored_quantised_is_what_transformers_loads(
    kind: str, quantised: str, tmp_path: Path
) -> None:
    folder, task = stored(kind, quantised, tmp_path), "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    expected = _auto(kind).from_pretrained(folder, dtype="auto")
    loaded = load_base(folder, task, "auto")
    assert contents(loaded) == contents(expected)
    assert loaded.config.to_dict() == expected.config.to_dict()
    # transformers leaves what is no code in the dtype that it is stored in, whatever is asked for.
    other = load_base(folder, task, torch.float32)
    given, codes = dict(other.named_parameters()), contents(expected)
    for name, parameter in expected.named_parameters():
        if type(parameter) is nn.Parameter:
            assert torch.equal(given[name], parameter.float()) and given[name].dtype == torch.float32
    for name, value in contents(other).items():
        assert (" of " not in name or name.startswith("kind of")) or value == codes[name]
    filled = meta_base(folder, task, "auto")
    assert all(parameter.is_meta for parameter in filled.parameters())
    assert contents(load_base(folder, task, "auto", into=filled)) == contents(expected)


def damaged(folder: str, change: Any) -> str:
    file = Path(folder) / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})
    return refusal(folder)


def test_stored_codes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    nf4, int8 = stored("llama", "nf4", tmp_path / "4"), stored("llama", "int8", tmp_path / "8")
    assert "is stored quantised; it cannot be quantised again" in refusal(nf4, quantization="int8")
    up = "model.layers.0.mlp.up_proj"
    said = damaged(nf4, lambda state: state.pop(f"{up}.weight.absmax"))
    assert f"the quantised weight '{up}.weight' lacks what belongs to its codes" in said
    said = damaged(
        int8, lambda state: state.update({f"{up}.weight_format": torch.tensor(2, dtype=torch.uint8)})
    )
    assert "laid out for one kind of GPU" in said
    said = damaged(int8, lambda state: state.pop(f"{up}.SCB"))
    assert f"'{up}.weight' lacks {up}.SCB" in said
    config = Path(int8) / "config.json"
    config.write_text(config.read_text().replace('"bitsandbytes"', '"gptq"'))
    with pytest.raises(
        BaseModelError, match="stored quantised, not by bitsandbytes; its codes are read whole"
    ):
        meta_base(int8)


def test_progress_goes_up_to_all_of_it(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_base(saved("llama", tmp_path), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0
