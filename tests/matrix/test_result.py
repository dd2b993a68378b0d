"""What is kept of the matrix, and the page's table of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.methods_table import PAGE
from tests.matrix import result
from tests.matrix.axes import CHECKS, METHODS, STAGES, STORAGES
from tests.matrix.result import Result, begun, latest, read, short, table, wrong_cells

YES = dict.fromkeys(CHECKS, "yes")


def test_every_cell_of_the_result_that_is_kept_holds() -> None:
    assert wrong_cells(latest()) == []


def test_the_page_has_the_result_that_is_kept() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "\n".join(table(latest())) in page
    assert "untested" not in page


def test_a_result_is_kept_after_each_stage_and_read_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="make matrix"):
        latest()
    made = begun()
    made.add("ZeRO-3", "int8", {"LORA": YES, "CPT": {**YES, "merges": "refused"}}, 1.26)
    made.add("one process", "fp32", {"LORA": {**YES, "holds": "no: too much"}}, 2.0)
    assert latest() == read(made.path) == made
    assert made.seconds == {"int8": {"ZeRO-3": 1.3}, "fp32": {"one process": 2.0}}
    cells = len(METHODS) * len(STAGES) * len(STORAGES)
    wrong = wrong_cells(made)
    assert len(wrong) == cells - 2
    assert f"LORA, one process, fp32: { ({**YES, 'holds': 'no: too much'}) }" in wrong
    assert "LORA, ZeRO-1, fp32: untested" in wrong


def test_a_cell_in_a_word() -> None:
    assert short(YES, "LORA") == "yes"
    assert short({**YES, "merges": "refused"}, "CPT") == "yes, unmerged"
    assert short({**YES, "merges": "no: lost", "saves": "no: empty"}, "LORA") == "not: saves, merges"
    assert short({}, "LORA") == short({"injects": "yes"}, "LORA") == "untested"


def test_the_table_has_every_method_stage_and_storage() -> None:
    made = Result("2026-01-01", "2cpu-x86_64", {"torch": "2"})
    made.cells = {storage: {stage: dict.fromkeys(METHODS, YES) for stage in STAGES} for storage in STORAGES}
    lines = table(made)
    header = next(line for line in lines if line.startswith("| method"))
    rows = [line for line in lines if line.startswith("| ") and line != header]
    assert len(rows) == len(METHODS)
    assert header.count("|") - 2 == len(STAGES) * len(STORAGES)
    assert {line.count("|") for line in rows} == {header.count("|")}
