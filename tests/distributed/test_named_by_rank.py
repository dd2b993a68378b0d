"""Under ZeRO-3 each rank names an adapter of another method: what they gather, they gather together.

A rank that gathered once more or in another order than its peer would end both.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from peft_dist import ahead
from tests.distributed import one_process as run
from tests.ranks import RankFailed, run_on_ranks

# One beside the next; ADAPTION_PROMPT stands beside no other method.
METHODS = [method for method in run.METHODS if method != "ADAPTION_PROMPT"]
PAIRS = list(zip(METHODS, [*METHODS[1:], METHODS[0]], strict=True))


def pairs(chosen: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [one_pair(*names) for names in chosen]


def one_pair(first: str, second: str) -> dict[str, Any]:
    """The first half of each micro-batch, which is rank 0's, names one adapter, the other half the other."""
    model, optimizer = run.build(
        3 if dist.is_initialized() else 0,
        {"first": run.METHODS[first](), "second": run.METHODS[second]()},
        partition_first=True,
        checkpointing=False,
    )

    def choose(place: int) -> str:
        return "first" if place < run.PER_MICRO_BATCH // 2 else "second"

    report = run.train(model, optimizer, range(2), choose)
    return {key: report[key] for key in ("losses", "norms")}


def test_ranks_that_name_other_methods_equal_one_process() -> None:
    alone = pairs(PAIRS)
    for rank in run_on_ranks(pairs, 2, PAIRS, timeout_s=240):
        for names, ours, one in zip(PAIRS, rank, alone, strict=True):
            # float64: what remains is another order of sums.
            assert ours["losses"] == pytest.approx(one["losses"], rel=1e-11), names
            assert ours["norms"] == [pytest.approx(norms, rel=1e-11) for norms in one["norms"]], names


def test_a_rank_that_runs_the_base_once_more_than_its_peer_ends_both() -> None:
    with mock.patch.object(ahead, "is_partitioned", lambda parameter: False), pytest.raises(RankFailed):
        run_on_ranks(pairs, 2, [("LORA", "XLORA")], timeout_s=40)
