"""Every method at each stage and on each storage, by the diagonal of the matrix; `make matrix` runs every cell."""

from __future__ import annotations

import pytest

from peft_dist.catalog import METHODS as CATALOG
from tests.matrix.axes import DIAGONAL, METHODS, NOT_MERGED, STAGES, STORAGES
from tests.matrix.group import judged


def test_every_method_is_in_the_matrix() -> None:
    assert set(METHODS) == set(CATALOG)


def test_only_these_may_refuse_to_merge() -> None:
    assert {name for name, row in CATALOG.items() if not row.merges} == NOT_MERGED


def test_the_diagonal_meets_every_storage_and_what_is_tested_nowhere_else() -> None:
    assert {storage for _, storage in DIAGONAL} == set(STORAGES)
    # The other stages are those of tests/distributed/test_equal_to_one_process.py; one process is each oracle.
    assert {stage for stage, _ in DIAGONAL} == {"ZeRO-3", "zero3-offload"} <= set(STAGES)


@pytest.mark.slow  # a minute: a process and a pair of processes, each through the lives of all methods
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stage", "storage"), DIAGONAL)
def test_a_cell_is_as_one_process(stage: str, storage: str) -> None:
    wrong = {
        f"{method}, {check}": came
        for method, checks in judged(stage, storage).items()
        for check, came in checks.items()
        if came != "yes" and not (came == "refused" and check == "merges" and method in NOT_MERGED)
    }
    assert not wrong
