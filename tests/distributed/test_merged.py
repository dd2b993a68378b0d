"""`save_merged` on a partitioned base, two ranks: one writes what one process would, and both raise what one meets."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

import peft_dist
from peft_dist import LoraConfig, sharding
from peft_dist.errors import MergeError
from peft_dist.merged import folder as folders
from peft_dist.merged import gathered as writing
from tests.contract import bases
from tests.contract.methods_table import IDS, inputs, model_of
from tests.peft_dist.test_save_merged import MERGED, Q, disturbed, llama, logits, mixtral, tensors
from tests.ranks import RankFailed, run_on_ranks

LM = {"r": 4, "task_type": "CAUSAL_LM"}
TEXT = {"input_ids": IDS}
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def _every_method(folder: str) -> dict[str, tuple[bool, Tensor]]:
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in MERGED:
            base = bases.llama()
            sharding.partition_base(base, ZERO3)
            model = model_of(method, base)
            before = [p.ds_tensor.clone() for p in base.parameters() if sharding.is_partitioned(p)]
            model.save_merged(f"{folder}/{method}", max_shard_size="20KB")
            after = [p.ds_tensor for p in base.parameters() if sharding.is_partitioned(p)]
            kept = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
            rests = sharding.elements_at_rest(base) < sum(p.numel() for p in bases.llama().parameters())
            found[method] = kept and rests, logits(model, {"input_ids": IDS, **inputs(method)})
    return found


@pytest.fixture(scope="module")
def every_method(tmp_path_factory) -> tuple[Path, list[dict[str, tuple[bool, Tensor]]]]:
    """One pair of processes writes the merged model of each method."""
    folder = tmp_path_factory.mktemp("merged")
    return folder, run_on_ranks(_every_method, 2, str(folder), timeout_s=400.0)


@pytest.mark.parametrize("method", MERGED)
def test_what_two_ranks_write_is_what_one_process_writes(every_method, tmp_path, method) -> None:
    folder, ranks = every_method
    # Nothing is left in the base, and nothing is left gathered.
    assert all(rank[method][0] for rank in ranks)
    opened = AutoModelForCausalLM.from_pretrained(folder / method)
    got = logits(opened, TEXT)
    for rank in ranks:
        torch.testing.assert_close(got, rank[method][1], rtol=1e-4, atol=2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_of(method).save_merged(tmp_path / "one", max_shard_size="20KB")
    one, two = tensors(tmp_path / "one"), tensors(folder / method)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def _base(kind: str) -> Any:
    if kind == "tied":
        return llama(tied=True)
    if kind == "experts":
        return mixtral()
    if kind == "bf16":
        return llama(dtype=torch.bfloat16)
    return bases.llama()


CONFIGS = {
    "tied": LoraConfig(**LM, target_modules=["embed_tokens", "q_proj"], modules_to_save=["norm"]),
    "experts": LoraConfig(**Q, target_parameters=["mlp.experts.gate_up_proj"]),
    "bf16": LoraConfig(**Q, use_dora=True),
}


def _kinds(folder: str) -> dict[str, Tensor]:
    found = {}
    for kind, config in CONFIGS.items():
        base = _base(kind)
        sharding.partition_base(base, ZERO3)
        torch.manual_seed(0)
        model = disturbed(peft_dist.get_peft_model(base, config))
        model.save_merged(f"{folder}/{kind}")
        found[kind] = logits(model, TEXT)
    return found


def test_ties_experts_and_half_precision(tmp_path) -> None:
    ranks = run_on_ranks(_kinds, 2, str(tmp_path))
    for kind in CONFIGS:
        opened, report = AutoModelForCausalLM.from_pretrained(tmp_path / kind, output_loading_info=True)
        assert not any(report.values()), (kind, report)
        # bf16: the adapter's own product is fp32, a merged weight is rounded.
        atol = 2e-2 if kind == "bf16" else 1e-5
        for rank in ranks:
            torch.testing.assert_close(logits(opened, TEXT).float(), rank[kind].float(), rtol=1e-3, atol=atol)
    assert json.loads((tmp_path / "tied/config.json").read_text())["tie_word_embeddings"] is False


STORAGES = {
    "8-bit": {"load_in_8bit": True},
    "4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


def _quantised(folder: str, storage: str, partitions: bool) -> Tensor:
    base = LlamaForCausalLM.from_pretrained(
        f"{folder}/base", quantization_config=BitsAndBytesConfig(**STORAGES[storage]), device_map={"": "cpu"}
    )
    if partitions:
        sharding.partition_base(base, ZERO3)
    torch.manual_seed(0)
    model = disturbed(peft_dist.get_peft_model(base, LoraConfig(**Q))).train()
    model.save_merged(f"{folder}/{storage}-{partitions}")
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("storage", STORAGES)
def test_a_quantised_base_in_pieces(tmp_path, storage) -> None:
    torch.manual_seed(0)
    bases.llama().save_pretrained(tmp_path / "base")
    (one,) = run_on_ranks(_quantised, 1, str(tmp_path), storage, False)
    run_on_ranks(_quantised, 2, str(tmp_path), storage, True)
    whole, pieces = (tensors(tmp_path / f"{storage}-{partitions}") for partitions in (False, True))
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[key], pieces[key]) for key in whole)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / f"{storage}-True")
    # 8-bit: its product rounds to fp16.
    torch.testing.assert_close(logits(opened, TEXT).float(), one.float(), rtol=2e-2, atol=2e-2)


def _failing(folder: str, where: str) -> str:
    base = bases.llama()
    sharding.partition_base(base, ZERO3)
    model = model_of("LORA", base)
    calls = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if where == "config" or len(calls) == 5:
            raise OSError(28, "No space left on device")

    if dist.get_rank() == 0:
        if where == "config":
            folders.write_config = fail
        elif where == "weights":
            written = writing.write_item
            writing.write_item = lambda *args: (fail(), written(*args))[1]
        else:
            folders.put = fail
            calls += [None] * 4
    try:
        model.save_merged(f"{folder}/{where}")
    except MergeError as error:
        # Both ranks are still of one mind.
        count = torch.ones(1)
        dist.all_reduce(count)
        assert count.item() == dist.get_world_size()
        return str(error)
    return "no error"


@pytest.mark.parametrize("where", ["config", "weights", "rename"])
def test_what_the_writing_rank_meets_both_raise_and_nothing_is_left(tmp_path, where) -> None:
    first, second = run_on_ranks(_failing, 2, str(tmp_path), where)
    assert "No space left on device" in first and "No space left on device" in second
    assert second.startswith("another rank could not write the merged model")
    assert not list(tmp_path.iterdir())


def _alone(folder: str) -> None:
    # The mechanism taken away: what is read outside a gather has no elements.
    base = bases.llama()
    sharding.partition_base(base, ZERO3)
    model = model_of("LORA", base)
    writing.gathered = lambda tensors: torch.no_grad()
    for name in ("merged.changes", "base_layer.layer"):
        module = getattr(peft_dist, name.partition(".")[0])
        getattr(module, name.partition(".")[2]).gathered = lambda tensors, **_: torch.no_grad()
    model.save_merged(f"{folder}/out")


def test_without_gathering_it_fails(tmp_path) -> None:
    with pytest.raises(RankFailed):
        run_on_ranks(_alone, 2, str(tmp_path))
    assert not (tmp_path / "out").exists()


def _replicated(folder: str) -> tuple[list[str], Tensor]:
    model = model_of("LORA")
    model.save_merged(f"{folder}/out")
    dist.barrier()
    return sorted(path.name for path in Path(folder).iterdir()), logits(model, TEXT)


def test_where_each_rank_has_the_base_one_writes(tmp_path) -> None:
    for names, want in run_on_ranks(_replicated, 2, str(tmp_path)):
        assert names == ["out"]
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(logits(opened, TEXT), want, rtol=1e-4, atol=2e-5)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()
