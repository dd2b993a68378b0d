"""Lineage: stored and read back, and the rows that an adapter has seen."""

from __future__ import annotations

import json
import math

from orchestrator import stored
from orchestrator.lineage import Lineage, count_trained_on, row_hashes, rows_file

from .adapters import BASE, lineage


def test_a_lineage_comes_back_as_it_was() -> None:
    facts = lineage(
        run_id="r", metrics={"eval_loss": 1.5, "worst": math.inf}, parent="a@1", gate_passed=True,
        gate_reasons=("a < b: holds, 1 < 2",), origin="registered from org/adapter",
    )  # fmt: skip
    document = stored.load(stored.dump({"lineage": facts.to_dict()}), "here")
    assert Lineage.from_dict(document["lineage"]) == facts


def test_keys_of_another_version_are_passed_over_and_missing_ones_take_their_default() -> None:
    document = json.loads(json.dumps(lineage().to_dict()))
    document["mood"] = "good"
    document["base"]["colour"] = "blue"
    del document["gate_passed"], document["base"]["source"]
    read = Lineage.from_dict(document)
    assert read.base.content_hash == BASE.content_hash and read.gate_passed is None


def test_rows_seen_in_training_are_counted() -> None:
    content = rows_file(["aa", "bb", "cc"])
    assert content == b"aa\nbb\ncc\n"
    assert row_hashes(content) == ["aa", "bb", "cc"]
    assert row_hashes(b"") == []
    assert count_trained_on(["bb", "dd", "bb"], row_hashes(content)) == 2
    assert count_trained_on([], {"aa"}) == 0
