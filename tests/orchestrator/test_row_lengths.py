import json

import pytest

from orchestrator.plan import make_plan
from orchestrator.plan.memory import LEFT_OVER
from orchestrator.plan.row_lengths import RowFacts, longest_row, num_labels

from .spec.jobs import spec_of
from .test_plan import ONE, llama

BASE = "model.base_model=jobs/assets/tiny-llama"


def rows(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


@pytest.mark.parametrize(
    ("kind", "short", "long"),
    [
        ("text", {"text": "a"}, {"text": "a b " * 50}),
        ("prompt_completion", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "a b " * 50}),
        ("alpaca", {"instruction": "a", "output": "b"}, {"instruction": "a b " * 50, "output": "c"}),
        ("chat", {"messages": [{"role": "user", "content": "a"}]},
         {"conversations": [{"from": "human", "value": "a b " * 50}]}),
        ("classification", {"text": "a", "label": "x"}, {"text": "a b " * 50, "label": "x"}),
        ("token-classification", {"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a", "b"] * 50, "tags": ["O"] * 100}),
        ("qa", {"question": "a", "context": "b", "answers": []},
         {"question": "a", "context": "a b " * 50, "answers": {"text": [], "answer_start": []}}),
        ("seq2seq", {"source": "a", "target": "b"}, {"source": "a b " * 50, "target": "b"}),
        ("embedding", {"anchor": "a", "positive": "b"}, {"anchor": "a", "positive": "a b " * 50}),
    ],
)  # fmt: skip
def test_the_longest_row_of_each_type(tmp_path, kind, short, long):
    def length(*values):
        path = rows(tmp_path / "rows.jsonl", *values)
        return longest_row(spec_of(overrides=[BASE, f"data.datasets=[{{path: {path}, type: {kind}}}]"]))

    assert length(short) < 25 < 90 < length(short, long, short) < 250
    assert length(long) == length(short, long)


def test_labels_are_counted_for_the_head(tmp_path):
    path = rows(
        tmp_path / "rows.jsonl",
        {"text": "a", "kind": 1},
        {"text": "b", "kind": "x"},
        {"text": "c", "kind": 1},
    )
    job = f"data.datasets=[{{path: {path}, type: classification, field_label: kind}}]"
    assert num_labels(spec_of(overrides=[BASE, job])) == 2
    assert num_labels(spec_of(overrides=[BASE, job.replace("kind", "nope")])) is None
    tagged = rows(tmp_path / "tags.jsonl", {"tokens": ["a", "b"], "tags": ["O", "B-X"]})
    assert (
        num_labels(spec_of(overrides=[f"data.datasets=[{{path: {tagged}, type: token-classification}}]"]))
        == 2
    )
    assert num_labels(spec_of()) is None


@pytest.mark.parametrize("path", ["nowhere.jsonl", "s3://bucket/x.jsonl", "someone/rows"])
def test_what_is_not_at_hand_is_not_known(path):
    assert longest_row(spec_of(overrides=[BASE, f"data.datasets.0.path={path}"])) is None


def test_damaged_rows_and_unknown_tokenizers_are_left_to_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{no json\n")
    assert longest_row(spec_of(overrides=[BASE, f"data.datasets.0.path={path}"])) is None
    assert longest_row(spec_of()) is None


def test_the_plan_counts_memory_by_the_longest_row():
    plan = make_plan(spec_of(), ONE, llama(), RowFacts(40))
    assert (
        plan.sequence_len == 40
        and "The longest row has about 40 tokens, of 512 that are allowed." in plan.notes
    )
    longest = make_plan(spec_of(), ONE, llama()).memory.activations
    assert plan.memory.activations - LEFT_OVER < (longest - LEFT_OVER) / 10
    assert make_plan(spec_of(), ONE, llama(), RowFacts(4000)).sequence_len == 512
