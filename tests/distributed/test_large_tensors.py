"""At stage 3 large trained tensors rest in pieces: values, reduced gradients and states; one process's results stay.

Also where the ranks name different adapters, and from a state that another number of ranks left.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from peft_dist import get_peft_model_state_dict, tuner
from peft_dist.optim import AdapterOptimizer
from peft_dist.rows import BASE
from peft_dist.sharding import rests_in_pieces
from tests.distributed import one_process as run
from tests.ranks import RankFailed, run_on_ranks

# LoRA trains a whole head beside its factors; OSF's factors are as large as its layers.
CASES = {"modules to save": ("LORA",), "OSF": ("OSF",), "two adapters, one a rank": ("LORA", "LORA")}
FROM = 20


def one_case(case: str, shard_from: int, state: dict[str, Tensor] | None) -> dict[str, Any]:
    names = dict(zip(("left", "right"), CASES[case], strict=False))
    with mock.patch.object(
        run, "AdapterOptimizer", lambda stage: AdapterOptimizer(stage, shard_from=shard_from)
    ):
        model, optimizer = run.build(
            3 if dist.is_initialized() else 0,
            {name: run.METHODS[method]() for name, method in names.items()},
            partition_first=True,
            checkpointing=False,
        )

    def choose(place: int) -> str:
        return [*names][0 if place < run.PER_MICRO_BATCH // 2 else -1]

    if state is not None:
        optimizer.load_whole_state(state)
    report = run.train(model, optimizer, range(run.STEPS), choose)
    pieces = {name: [p for p in run.trained(model, name).values() if rests_in_pieces(p)] for name in names}
    return {
        "losses": report["losses"],
        "norms": report["norms"],
        "at_rest": report["at_rest"],
        "state": optimizer.whole_state(),
        "bytes": optimizer.state_bytes(),
        "saved": {name: get_peft_model_state_dict(model, adapter_name=name) for name in names},
        "pieces": sum(map(len, pieces.values())),
        "gradients": sum(p.grad is not None for own in pieces.values() for p in own),
    }


def all_cases(shard_from: int, states: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {case: one_case(case, shard_from, states.get(case)) for case in CASES}


def test_large_tensors_rest_in_pieces_and_train_as_in_one_process() -> None:
    one = all_cases(FROM, {})
    later = all_cases(FROM, {case: report["state"] for case, report in one.items()})
    for case, ranks in _by_case(run_on_ranks(all_cases, 2, FROM, {})).items():
        _check(ranks, one[case])
        for rank in ranks:
            assert rank["pieces"] and not rank["gradients"], case
            # Of odd sizes a piece is padded; small tensors belong to one rank whole.
            assert all(
                held < 0.6 * whole for held, whole in zip(rank["at_rest"], one[case]["at_rest"], strict=True)
            )
        assert sum(rank["bytes"] for rank in ranks) < 1.05 * one[case]["bytes"]
        assert max(rank["bytes"] for rank in ranks) < 0.6 * one[case]["bytes"]
    states = {case: report["state"] for case, report in one.items()}
    for case, ranks in _by_case(run_on_ranks(all_cases, 2, FROM, states)).items():
        _check(ranks, later[case])


def test_without_pieces_they_rest_whole() -> None:
    one = all_cases(FROM, {})
    for case, ranks in _by_case(run_on_ranks(all_cases, 2, 10**9, {})).items():
        _check(ranks, one[case])
        for rank in ranks:
            assert not rank["pieces"]
            assert any(
                held > 0.6 * whole for held, whole in zip(rank["at_rest"], one[case]["at_rest"], strict=True)
            )


def _by_case(ranks: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {case: [rank[case] for rank in ranks] for case in CASES}


def _check(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    # float64: what remains is another order of sums.
    exact = {"rtol": 1e-9, "atol": 1e-11}
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank["losses"]), torch.tensor(one["losses"]), **exact)
        for ours, theirs in zip(rank["norms"], one["norms"], strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours:
                torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(theirs[name]), **exact)
        assert list(rank["state"]) == list(one["state"])
        torch.testing.assert_close(rank["state"], one["state"], **exact)
        torch.testing.assert_close(rank["saved"], one["saved"], **exact)


def added_later() -> dict[str, Any]:
    """A step of one adapter and one more beside another that came meanwhile, then rows that name both, and neither."""
    with mock.patch.object(run, "AdapterOptimizer", lambda stage: AdapterOptimizer(stage, shard_from=FROM)):
        stage, first = 3 if dist.is_initialized() else 0, {"left": run.METHODS["POLY"]()}
        model, optimizer = run.build(stage, first, partition_first=True, checkpointing=False)
    losses = run.train(model, optimizer, range(1))["losses"]
    model.add_adapter("right", run.METHODS["POLY"]())
    model.set_requires_grad("right", True)
    optimizer.add("right", run.trained(model, "right"), run.HYPER)
    losses += run.train(model, optimizer, range(1, 2))["losses"]
    names = ["left", BASE, "right", "left"]
    losses += run.train(model, optimizer, range(2, 4), names.__getitem__)["losses"]
    return {"losses": losses, "state": get_peft_model_state_dict(model, adapter_name="right")}


def test_an_adapter_that_comes_after_a_step_rests_in_pieces_too() -> None:
    one = added_later()
    for rank in run_on_ranks(added_later):
        torch.testing.assert_close(rank, one, rtol=1e-9, atol=1e-11)


def encoders_by_rank() -> list[float]:
    """Steps in which each rank names an encoder of virtual tokens of its own."""
    configs = {"left": run.METHODS["P_TUNING"](), "right": run.METHODS["PREFIX_TUNING"]()}
    with mock.patch.object(run, "AdapterOptimizer", lambda stage: AdapterOptimizer(stage, shard_from=FROM)):
        stage = 3 if dist.is_initialized() else 0
        model, optimizer = run.build(stage, configs, partition_first=True, checkpointing=False)
    names = ["left", BASE, "right", "right"]
    return run.train(model, optimizer, range(2), names.__getitem__)["losses"]


def test_ranks_gather_the_encoders_of_virtual_tokens_alike() -> None:
    one = encoders_by_rank()
    for losses in run_on_ranks(encoders_by_rank):
        assert losses == pytest.approx(one, rel=1e-9)


def a_term_of_the_loss(gathers: bool = True) -> dict[str, Any]:
    """AdaLoRA's, and its adapter after a step by that alone."""
    with mock.patch.object(run, "AdapterOptimizer", lambda stage: AdapterOptimizer(stage, shard_from=FROM)):
        stage = 3 if dist.is_initialized() else 0
        configs = {"default": run.METHODS["ADALORA"]()}
        model, optimizer = run.build(stage, configs, partition_first=True, checkpointing=False)
    with contextlib.nullcontext() if gathers else mock.patch.object(tuner, "reach", mock.Mock()):
        for _ in range(2):
            optimizer.zero_grad()
            term = model.base_model.extra_loss()
            (term / run.rank_and_world()[1]).backward()
            optimizer.reduce()
            optimizer.step()
    return {"term": term.item(), "state": get_peft_model_state_dict(model)}


def test_a_term_of_the_loss_is_of_whole_tensors() -> None:
    one = a_term_of_the_loss()
    for rank in run_on_ranks(a_term_of_the_loss):
        assert rank["term"] == pytest.approx(one["term"], rel=1e-12)
        for key, value in one["state"].items():
            torch.testing.assert_close(rank["state"][key], value)


def test_a_term_of_the_loss_is_none_of_pieces() -> None:
    with pytest.raises(RankFailed, match="mT is only supported"):
        run_on_ranks(a_term_of_the_loss, 2, False, timeout_s=20.0)
