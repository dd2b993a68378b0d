"""The whole way from the spec's data section to examples, and the account of it."""

import json

import pytest

from orchestrator.errors import DataError
from orchestrator.spec.job import JobSpec
from orchestrator.train.worker.data import allowed_length, load_examples

from .chats import tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count, start=0):
    return [{"prompt": f"question {i} ", "completion": f"answer {i}"} for i in range(start, start + count)]


def job(*datasets, evaluation=(), eval_rows=None, **data):
    def dataset(given):
        values = given if isinstance(given, dict) else {"path": str(given)}
        return {"type": "prompt_completion", **values}

    return JobSpec(
        name="j",
        model={"base_model": "base"},
        data={"datasets": [dataset(d) for d in datasets], **data},
        eval={"datasets": [dataset(d) for d in evaluation], "max_rows": eval_rows},
    )


def load(*datasets, max_len=512, **options):
    return load_examples(job(*datasets, **options), tokenizer(), max_len=max_len)


def failure(*datasets, max_len=512, **options) -> str:
    with pytest.raises(DataError) as caught:
        load(*datasets, max_len=max_len, **options)
    return str(caught.value)


def answers(examples):
    return [example.answer for example in examples]


def test_rows_go_to_one_side_each_and_stay_there_when_data_is_added(tmp_path):
    before = load(write(tmp_path / "a.jsonl", pairs(200)), val_set_size=0.2)
    after = load(write(tmp_path / "b.jsonl", [*pairs(300, 100), *pairs(200)]), val_set_size=0.2)
    assert not set(answers(before.train)) & set(answers(before.evaluation))
    both = answers(before.train) + answers(before.evaluation)
    assert sorted(both) == sorted(row["completion"] for row in pairs(200))
    assert set(answers(before.evaluation)) <= set(answers(after.evaluation))
    assert 20 <= before.report.evaluation_rows <= 60  # 40 expected; three and a half standard deviations


def test_same_data_gives_the_same_examples(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(50))
    assert load(path) == load(path)


def test_number_of_held_out_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(50))
    found = load(path, val_set_size=7)
    assert (found.report.evaluation_rows, found.report.train_rows) == (7, 43)
    assert load(path, val_set_size=0).evaluation == []


def test_duplicates_are_counted_and_never_on_both_sides(tmp_path):
    rows = [*pairs(40), *pairs(20)]
    rows[50]["id"] = 7  # another column makes no other row
    found = load(write(tmp_path / "a.jsonl", rows), val_set_size=0.3)
    assert found.report.duplicates == 20
    assert not set(answers(found.train)) & set(answers(found.evaluation))
    assert len(answers(found.evaluation)) == len(set(answers(found.evaluation)))
    twice = [answer for answer in answers(found.train) if answers(found.train).count(answer) == 2]
    assert twice and set(twice) <= {row["completion"] for row in pairs(20)}


def test_weights_repeat_training_rows_and_no_others(tmp_path):
    a, b = write(tmp_path / "a.jsonl", pairs(40)), write(tmp_path / "b.jsonl", pairs(40, 100))
    found = load({"path": str(a), "weight": 2}, b, val_set_size=0.25)
    numbers = [int(answer.split()[1]) for answer in answers(found.train)]
    assert all(numbers.count(n) == (2 if n < 100 else 1) for n in numbers)
    assert len(answers(found.evaluation)) == len(set(answers(found.evaluation)))
    assert found.report.rows_by_dataset == {str(a): 40, str(b): 40}


def test_evaluation_rows_of_their_own_are_kept_from_training(tmp_path):
    train, held = write(tmp_path / "a.jsonl", pairs(30)), write(tmp_path / "e.jsonl", pairs(10, 25))
    found = load(train, evaluation=[held], val_set_size=0.5)
    assert sorted(answers(found.train)) == sorted(row["completion"] for row in pairs(25))
    assert answers(found.evaluation) == [row["completion"] for row in pairs(10, 25)]
    assert found.report.kept_from_training == 5


def test_max_rows_takes_the_same_rows_whatever_their_order(tmp_path):
    one = load(write(tmp_path / "a.jsonl", pairs(60)), val_set_size=30, eval_rows=5)
    other = load(write(tmp_path / "b.jsonl", pairs(60)[::-1]), val_set_size=30, eval_rows=5)
    assert len(one.evaluation) == 5
    assert set(answers(one.evaluation)) == set(answers(other.evaluation))
    assert one.report.train_rows == 30  # what max_rows leaves out is not trained on either


def test_sequence_len_is_what_the_base_allows_at_most_2048():
    assert allowed_length(job("x"), 512) == 512
    assert allowed_length(job("x"), 100_000) == 2048
    assert allowed_length(job("x"), None) == 2048
    assert allowed_length(job("x", sequence_len=64), 512) == 64
    assert allowed_length(job("x", sequence_len=4096), None) == 4096
    with pytest.raises(DataError) as caught:
        allowed_length(job("x", sequence_len=4096), 512)
    assert str(caught.value) == (
        "data.sequence_len: 4096 tokens are more than the 512 that base allows a row. Set it to 512 or less."
    )


def long_rows():
    return [*pairs(10), {"prompt": "question ", "completion": "word " * 100}]


def test_overlong_rows_are_cut_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", long_rows())
    found = load(path, val_set_size=0, sequence_len=40)
    assert (found.report.truncated, found.report.dropped, found.report.train_rows) == (1, 0, 11)
    assert max(len(example.input_ids) for example in found.train) == 40
    assert found.report.longest > 100
    assert "1 cut to 40 tokens" in found.report.sentence()


def test_overlong_rows_are_dropped_and_counted(tmp_path):
    found = load(write(tmp_path / "a.jsonl", long_rows()), val_set_size=0, sequence_len=40, overlong="drop")
    assert (found.report.dropped_overlong, found.report.truncated, found.report.train_rows) == (1, 0, 10)
    assert found.report.sentence().endswith("1 dropped as too long")


def test_overlong_rows_are_an_error_that_names_the_longest(tmp_path):
    path = write(tmp_path / "a.jsonl", long_rows())
    full = load(path, val_set_size=0).report.longest
    assert failure(path, sequence_len=40, overlong="error") == (
        f"{path}:11: 1 of 11 rows are longer than 40 tokens; this one, the longest, has {full}. "
        "Raise data.sequence_len, or set data.overlong to truncate or drop."
    )


def test_rows_without_a_target_are_dropped_and_counted(tmp_path):
    rows = [*pairs(5), {"prompt": "word " * 100, "completion": "cut away"}]
    found = load(write(tmp_path / "a.jsonl", rows), val_set_size=0, sequence_len=40)
    assert (found.report.dropped_without_answer, found.report.train_rows) == (1, 5)
    report = found.report
    assert report.rows == report.train_rows + report.evaluation_rows + report.dropped


def test_token_counts(tmp_path):
    found = load(write(tmp_path / "a.jsonl", pairs(20)), val_set_size=3)
    assert found.report.train_tokens == sum(len(example.input_ids) for example in found.train)
    assert found.report.trained_tokens == sum(label != -100 for e in found.train for label in e.labels)
    assert json.loads(json.dumps(found.report.to_dict()))["rows"] == 20


def test_empty_dataset_is_named(tmp_path):
    full, empty = write(tmp_path / "a.jsonl", pairs(3)), write(tmp_path / "empty.jsonl", [])
    assert failure(full, empty) == f"{empty}: holds no row. Each dataset needs at least one row."
    (tmp_path / "empty.csv").write_text("prompt,completion\n")
    assert "holds no row" in failure(tmp_path / "empty.csv")


def test_everything_dropped_says_why(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "word " * 50, "completion": "x"}] * 4)
    assert failure(path, sequence_len=20) == (
        f"{path}: all 4 rows were dropped: 0 longer than 20 tokens, 4 without an answer to train on. "
        "Look at them with `raypeft inspect`; check data.datasets[].type and data.sequence_len."
    )


def test_nothing_left_to_train_on(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(4))
    assert failure(path, val_set_size=4) == (
        "data.val_set_size: no row is left to train on: all 4 are evaluation rows or left out by their "
        "weight. Hold out fewer rows, or add data."
    )
    assert failure(path, evaluation=[path]).startswith("eval.datasets: no row is left to train on")


def test_missing_column_reaches_the_user(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completon": "b"}])
    assert f"{path}:1: has no column 'completion'" in failure(path)
    assert "Closest: 'completon'" in failure(path)
