"""A base that two ranks load in pieces is one process's: parameters, codes, statistics, buffers and outputs."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import peft_dist
from peft_dist import sharding
from peft_dist.loading import load_base, meta_base, pieces
from peft_dist.loading.stored import File
from tests import small_bases
from tests.ranks import RankFailed, run_on_ranks

STAGE_3 = {"zero_optimization": {"stage": 3}}
IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
# Sizes at which neither rows nor blocks end where a rank's share does.
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
saved = functools.partial(
    small_bases.saved,
    small_bases.Sizes(
        SIZES, middle=110, expert=40, gpt2={"vocab_size": 97, "n_embd": 60, "n_head": 2, "n_positions": 32}
    ),
)


def contents(base: nn.Module) -> dict[str, bytes]:
    found = {f"buffer {name}": as_bytes(buffer) for name, buffer in base.named_buffers()}
    for name, parameter in base.named_parameters():
        with sharding.gathered([parameter]):
            found[name] = as_bytes(parameter)
    return found


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def described(base: Any) -> tuple[Any, ...]:
    with torch.no_grad():
        logits = base(input_ids=IDS).logits.clone()
    return contents(base), logits, sharding.bytes_at_rest(base)


def kinds(dtype: torch.dtype) -> list[Any]:
    return [
        None,
        "int8",
        "nf4",
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=dtype),
    ]


def in_pieces(folder: str, dtype: torch.dtype) -> list[Any]:
    return [described(load_base(folder, "CAUSAL_LM", dtype, asked, 3)) for asked in kinds(dtype)]


def whole_then_cut(folder: str, dtype: torch.dtype) -> list[Any]:
    """transformers' own loading on each rank, partitioned afterwards."""
    given = []
    for asked in kinds(dtype):
        config = pieces_config(asked)
        more = {} if config is None else {"quantization_config": config, "device_map": {"": "cpu"}}
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)
        sharding.partition_base(base, STAGE_3)
        given.append(described(base))
    return given


def pieces_config(asked: Any) -> Any:
    if asked == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if asked == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    return asked


@pytest.mark.parametrize(
    ("kind", "world", "dtype"),
    [
        ("tied", 3, torch.bfloat16),
        ("mixture", 2, torch.float32),
        ("gpt2", 3, torch.float32),
    ],
)
def test_pieces_are_those_of_the_whole(kind: str, world: int, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path)
    for ours, theirs in zip(
        run_on_ranks(in_pieces, world, folder, dtype, timeout_s=300),
        run_on_ranks(whole_then_cut, world, folder, dtype, timeout_s=300),
        strict=True,
    ):
        for (values, logits, held), (expected, reference, theirs_held) in zip(ours, theirs, strict=True):
            assert values == expected
            assert torch.equal(logits, reference)
            assert held == theirs_held


def with_buffers(folder: str, reads: bool = True) -> dict[str, Any]:
    more = (
        contextlib.nullcontext() if reads else mock.patch.object(pieces._Pieces, "read_buffers", mock.Mock())
    )
    with more:
        base = load_base(folder, "SEQ_2_SEQ_LM", zero_stage=3)
    with torch.no_grad():
        logits = base(input_ids=IDS, decoder_input_ids=IDS).logits.clone()
    return {"logits": logits, "bias": base.final_logits_bias}


def bart(folder: Path) -> Any:
    """A base whose files hold a buffer, which is no parameter that an engine would partition."""
    sizes = {f"{half}_{what}": 2 for half in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16}
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=97, **sizes, **widths)
    ).eval()
    model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    return model


def test_buffers_that_the_files_hold_are_whole_on_every_rank(tmp_path: Path) -> None:
    base = bart(tmp_path)
    with torch.no_grad():
        expected = base(input_ids=IDS, decoder_input_ids=IDS).logits
    for rank in run_on_ranks(with_buffers, 2, str(tmp_path)):
        assert torch.equal(rank["bias"], base.final_logits_bias)
        torch.testing.assert_close(rank["logits"], expected)


def test_a_buffer_that_nobody_reads_is_no_base(tmp_path: Path) -> None:
    bart(tmp_path)
    with pytest.raises(RankFailed, match="final_logits_bias of BartForConditionalGeneration got no values"):
        run_on_ranks(with_buffers, 2, str(tmp_path), False)


def stored_in_pieces(folders: list[str]) -> list[Any]:
    return [described(load_base(folder, "CAUSAL_LM", "auto", None, 3)) for folder in folders]


def stored_then_cut(folders: list[str]) -> list[Any]:
    given = []
    for folder in folders:
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        sharding.partition_base(base, STAGE_3)
        given.append(described(base))
    return given


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
def test_pieces_of_stored_codes_are_those_of_the_whole(kind: str, tmp_path: Path) -> None:
    full, folders = saved(kind, tmp_path / "full"), []
    for number, asked in enumerate(kinds(torch.bfloat16)[1:]):
        base = load_base(full, "CAUSAL_LM", torch.bfloat16, asked)
        base.save_pretrained(tmp_path / str(number))
        folders.append(str(tmp_path / str(number)))
    # Of nf4, the levels of one layer's statistics are not those that bitsandbytes has now.
    state = load_file(tmp_path / "1" / "model.safetensors")
    key = next(key for key in state if key.endswith("nested_quant_map"))
    state[key] = state[key] * 0.5
    save_file(state, tmp_path / "1" / "model.safetensors", metadata={"format": "pt"})
    for ours, theirs in zip(
        run_on_ranks(stored_in_pieces, 3, folders, timeout_s=300),
        run_on_ranks(stored_then_cut, 3, folders, timeout_s=300),
        strict=True,
    ):
        for (values, logits, held), (expected, reference, theirs_held) in zip(ours, theirs, strict=True):
            assert values == expected
            assert torch.equal(logits, reference)
            assert held == theirs_held


def reading(folder: str, quantised: str | None, zero_stage: int) -> tuple[int, int]:
    """Bytes of values that this rank read, and bytes of all of them."""
    opened: dict[Path, File] = {}
    close = File.close

    def counted(file: File) -> None:
        opened[file.path] = file
        close(file)

    File.close = counted  # type: ignore[method-assign]
    dtype = "auto" if quantised is None else torch.float32
    load_base(folder, "CAUSAL_LM", dtype, quantised, zero_stage)
    stored = [tensor for file in opened.values() for tensor in file.tensors.values()]
    total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in stored)
    return sum(file.bytes_read for file in opened.values()), total


@pytest.mark.parametrize("quantised", [None, "nf4", "stored nf4", "stored int8"])
def test_a_rank_reads_its_own_part_alone(quantised: str | None, tmp_path: Path) -> None:
    folder = saved("mixture", tmp_path / "full")
    if quantised is not None and quantised.startswith("stored"):
        load_base(folder, quantization=quantised.split()[1]).save_pretrained(tmp_path / "stored")
        folder, quantised = str(tmp_path / "stored"), None
    for read, total in run_on_ranks(reading, 2, folder, quantised, 3):
        # Rows or blocks at the borders, a few of each of two dozen tensors.
        assert total / 2 * 0.95 < read < total / 2 * 1.1
    # A rank that keeps all of it reads all of it.
    assert all(read == total for read, total in run_on_ranks(reading, 2, folder, quantised, 0))


def own_statistics_alone(folder: str) -> bool:
    """Whether a rank that quantises its own statistics, and not all of a layer's, goes unseen."""
    right = contents(load_base(folder, quantization="nf4", zero_stage=3))

    def mine(self: Any, piece: Tensor, total: int) -> Tensor:
        return piece.repeat(self.world)[:total]

    pieces.Ranks.gathered = mine  # type: ignore[method-assign]
    return contents(load_base(folder, quantization="nf4", zero_stage=3)) == right


def test_statistics_of_statistics_need_all_of_a_layer(tmp_path: Path) -> None:
    assert run_on_ranks(own_statistics_alone, 2, saved("llama", tmp_path)) == [False, False]


def adapters_first(folder: str) -> tuple[Any, ...]:
    config = peft_dist.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    model = peft_dist.get_peft_model(meta_base(folder), config)
    load_base(folder, zero_stage=3, into=model)
    assert sharding.is_partitioned_base(model)
    with torch.no_grad():
        before = model(input_ids=IDS).logits.clone()
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return before, grads


def test_adapters_that_wait_on_a_meta_base_start_when_it_is_there(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    config = peft_dist.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    whole = peft_dist.get_peft_model(load_base(folder), config)
    with torch.no_grad():
        expected = whole(input_ids=IDS).logits
    for logits, grads in run_on_ranks(adapters_first, 2, folder):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert grads and all(bool(grad.any()) for name, grad in grads.items() if "lora_" in name)


def one_fails(folder: str, at: str) -> str:
    if torch.distributed.get_rank() == 1 and at == "config":
        folder += "-elsewhere"
    if torch.distributed.get_rank() == 1 and at == "read":

        def broken(*args: object) -> None:
            raise OSError("the disk is gone")

        File.read = broken  # type: ignore[method-assign]
    with pytest.raises(OSError) as caught:
        load_base(folder, quantization="nf4", zero_stage=3)
    return str(caught.value)


@pytest.mark.parametrize(("at", "reason"), [("config", "is not a directory"), ("read", "the disk is gone")])
def test_a_rank_that_cannot_read_ends_all(at: str, reason: str, tmp_path: Path) -> None:
    other, failed = run_on_ranks(one_fails, 2, saved("llama", tmp_path / "base"), at)
    assert reason in failed
    assert other.startswith("base model: rank 1 of 2 could not load its part. ") and reason in other
