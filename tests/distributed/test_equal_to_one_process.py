"""Law 8: under every ZeRO stage two ranks give one process's losses, gradients and saved adapter.

Also with gradient checkpointing and accumulation, and when the ranks name different adapters; under ZeRO-3
also a start from the base, an evaluation, a merge and a save. Each claim has a control without its mechanism.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_dist import merge, sharding
from peft_dist.catalog import METHODS as CATALOG
from peft_dist.checkpoint import WEIGHTS_NAME
from peft_dist.optim import AdapterOptimizer
from peft_dist.pooled import PooledModule
from tests.distributed import one_process as run
from tests.ranks import run_on_ranks

# float64: sums in another order differ by 1e-16 of their size; AdamW over 3 steps at 1e-3 keeps that below
# 1e-12.
EXACT = 1e-11


def one_method(method: str, stage: int, folder: str) -> dict[str, Any]:
    """Train, evaluate and save one method; at stage 3 also merge, evaluate merged, and unmerge."""
    model, optimizer = run.build(
        stage,
        {"default": run.METHODS[method]()},
        partition_first=method != "IA3",
        checkpointing=method not in ("PROMPT_TUNING", "PREFIX_TUNING"),
    )
    report = run.train(model, optimizer, range(run.STEPS))
    report["logits"] = run.evaluate(model)
    report["at_rest"].append(sharding.elements_at_rest(model))
    holders = [module for module in model.modules() if isinstance(module, PooledModule)]
    tensors = [t for holder in holders for name in holder.adapters for t in holder.tensors(name).values()]
    report["own"] = sum({id(t): t.numel() for t in tensors if isinstance(t, nn.Parameter)}.values())
    run.saved(model, f"{folder}/{method}")
    if CATALOG[method].merges:
        base = model.get_base_model()
        merge.merge(base)
        report["merged"] = [run.evaluate(model), run.evaluate(model)]
        report["at_rest"].append(sharding.elements_at_rest(model))
        merge.unmerge(base)
        report["unmerged"] = run.evaluate(model)
    return report


def all_methods(stage: int, folder: str) -> dict[str, dict[str, Any]]:
    return {method: one_method(method, stage, folder) for method in run.METHODS}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("alone")
    return all_methods(0, str(folder)), folder


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference as a share of the other's largest entry, tensor by tensor."""
    differences = [(ours[k] - theirs[k]).abs().max() / theirs[k].abs().max().clamp(min=1e-30) for k in ours]
    return max(map(float, differences), default=0.0)


def test_every_method_of_the_catalog_is_tested_here() -> None:
    assert set(run.METHODS) == set(CATALOG)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one_process(stage: int, alone: tuple, tmp_path: Path) -> None:
    expected, expected_folder = alone
    ranks = run_on_ranks(all_methods, 2, stage, str(tmp_path))
    for method, one in expected.items():
        kept: set[str] = set()
        for report in (rank[method] for rank in ranks):
            assert report["losses"] == pytest.approx(one["losses"], rel=EXACT), method
            assert report["norms"] == [pytest.approx(norms, rel=EXACT) for norms in one["norms"]], method
            assert furthest(report["gradients"], one["gradients"]) < EXACT, method
            kept |= set(report["gradients"])
            torch.testing.assert_close(report["logits"], one["logits"], rtol=0, atol=EXACT)
            for merged in report.get("merged", ()):
                torch.testing.assert_close(merged, one["merged"][0], rtol=0, atol=EXACT)
                torch.testing.assert_close(merged, one["logits"], rtol=0, atol=EXACT)
            if "merged" in report:
                assert torch.equal(report["unmerged"], report["logits"])
        assert kept == set(one["gradients"]), method
        # AdaLoRA's budget reads gradients that every rank has whole.
        if stage >= 2 and method != "ADALORA":
            assert not set(ranks[0][method]["gradients"]) & set(ranks[1][method]["gradients"]), method
        ours = load_file(tmp_path / method / WEIGHTS_NAME)
        theirs = load_file(expected_folder / method / WEIGHTS_NAME)
        assert list(ours) == list(theirs)
        # An embedding's row that no sample named has a gradient of 0, and AdamW's 0 / eps stays 0.
        assert furthest(ours, theirs) < 1e-9, method
        assert {p.name for p in (tmp_path / method).iterdir()} == {
            p.name for p in (expected_folder / method).iterdir()
        }


@pytest.mark.parametrize("stage", [3])
def test_at_stage_3_a_rank_holds_its_share_at_rest(stage: int, tmp_path: Path) -> None:
    whole_base = sum(p.numel() for p in run.base().parameters())
    ranks = run_on_ranks(all_methods, 2, stage, str(tmp_path))
    for rank in ranks:
        for method, report in rank.items():
            # After every step, after an evaluation, and after a merge.
            held = whole_base // 2 + report["own"]
            assert report["at_rest"] == [held] * len(report["at_rest"]), method


# Ranks that name different adapters

PAIRS = {
    "two LoRAs": ("LORA", "LORA"),
    "two IA3s": ("IA3", "IA3"),
    "two prompts": ("PROMPT_TUNING", "PROMPT_TUNING"),
    "LoRA and IA3": ("LORA", "IA3"),
    "prompt and LoRA": ("PROMPT_TUNING", "LORA"),
    "prefix and prompt": ("PREFIX_TUNING", "PROMPT_TUNING"),
    "P-tuning and adaption prompt": ("P_TUNING", "ADAPTION_PROMPT"),
    "multitask and CPT": ("MULTITASK_PROMPT_TUNING", "CPT"),
}


def split_by_rank(place: int) -> str:
    """The first half of a micro-batch, which is rank 0's, names `left`; the second, rank 1's, `right`."""
    return "left" if place < run.PER_MICRO_BATCH // 2 else "right"


def one_pair(pair: str, stage: int, folder: str) -> dict[str, Any]:
    left, right = (run.METHODS[method]() for method in PAIRS[pair])
    model, optimizer = run.build(
        stage, {"left": left, "right": right}, partition_first=True, checkpointing=False
    )
    report = run.train(model, optimizer, range(run.STEPS), split_by_rank)
    run.saved(model, f"{folder}/{pair}")
    return report


def all_pairs(stage: int, folder: str) -> dict[str, dict[str, Any]]:
    return {pair: one_pair(pair, stage, folder) for pair in PAIRS}


@pytest.fixture(scope="module")
def pairs_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("pairs")
    return all_pairs(0, str(folder)), folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_that_name_different_adapters_equal_one_mixed_batch(
    stage: int, pairs_alone: tuple, tmp_path: Path
) -> None:
    expected, expected_folder = pairs_alone
    ranks = run_on_ranks(all_pairs, 2, stage, str(tmp_path))
    for pair, one in expected.items():
        for report in (rank[pair] for rank in ranks):
            assert report["losses"] == pytest.approx(one["losses"], rel=EXACT), pair
            assert furthest(report["gradients"], one["gradients"]) < EXACT, pair
        assert set(ranks[0][pair]["gradients"]) | set(ranks[1][pair]["gradients"]) == set(one["gradients"]), (
            pair
        )
        for name in ("left", "right"):
            ours = load_file(tmp_path / pair / name / WEIGHTS_NAME)
            theirs = load_file(expected_folder / pair / name / WEIGHTS_NAME)
            assert furthest(ours, theirs) < 1e-9, (pair, name)


# Controls


def lora_without_a_sum(stage: int) -> dict[str, Any]:
    model, optimizer = run.build(
        stage, {"default": run.METHODS["LORA"]()}, partition_first=True, checkpointing=False
    )
    with mock.patch.object(AdapterOptimizer, "_sum", lambda self, bucket, owner: None):
        return run.train(model, optimizer, range(run.STEPS))


@pytest.mark.parametrize("stage", [0, 3])
def test_without_a_sum_over_the_ranks_gradients_are_wrong(stage: int, alone: tuple) -> None:
    one = alone[0]["LORA"]
    for report in run_on_ranks(lora_without_a_sum, 2, stage):
        assert furthest(report["gradients"], one["gradients"]) > 0.1
        assert abs(report["losses"][-1] - one["losses"][-1]) > 1e-6


def start_without_gathering() -> str:
    with mock.patch("peft_dist.base_layer.layer.gathered", lambda p, modify=False: contextlib.nullcontext()):
        try:
            run.build(3, {"default": run.METHODS["LORA"]()}, partition_first=True, checkpointing=False)
        except Exception as error:
            return type(error).__name__
    return "started"


def test_a_start_from_a_partitioned_base_needs_the_gathering() -> None:
    assert "started" not in run_on_ranks(start_without_gathering)


def merge_without_a_writer() -> float:
    model, _ = run.build(3, {"default": run.METHODS["IA3"]()}, partition_first=True, checkpointing=False)
    expected = run.evaluate(model)
    real = sharding.gathered
    with mock.patch("peft_dist.base_layer.layer.gathered", lambda p, modify=False: real(p)):
        merge.merge(model.get_base_model())
    return (run.evaluate(model) - expected).abs().max().item()


def test_a_merge_that_no_rank_writes_back_is_lost() -> None:
    assert min(run_on_ranks(merge_without_a_writer)) > 1e-4


def at_rest_without_the_hooks(mechanism: str) -> int:
    with mock.patch.object(sharding, mechanism):
        model, optimizer = run.build(
            3, {"default": run.METHODS["LORA"]()}, partition_first=True, checkpointing=False
        )
        report = run.train(model, optimizer, range(2))
        run.evaluate(model)
    return max(*report["at_rest"], sharding.elements_at_rest(model))


def test_without_our_hooks_weights_stay_gathered() -> None:
    whole_base = sum(p.numel() for p in run.base().parameters())
    ranks = run_on_ranks(at_rest_without_the_hooks, 2, "_release_when_done")
    assert min(ranks) > whole_base
