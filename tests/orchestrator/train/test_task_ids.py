"""Methods that learn several tasks: which task a row is of, and what is refused."""

from __future__ import annotations

import json

import pytest

from orchestrator.errors import DataError
from orchestrator.spec.job import AdapterSpec
from orchestrator.train.rows.sources import SourceRow
from orchestrator.train.rows.task_ids import TaskNumbers, task_numbers
from orchestrator.train.rows.tokenizer import load_tokenizer
from orchestrator.train.worker.data import load_examples
from orchestrator.train.worker.run import train

from .ends import adapter_of
from .tiny import job, plan, request

POLY = {"type": "poly", "r": 2, "n_skills": 2, "n_tasks": 2}


def two_datasets(folder, **columns):
    paths = []
    for number in range(2):
        path = folder / f"part{number}.jsonl"
        rows = [{"prompt": f"{number} {n} ", "completion": str(n), **columns} for n in range(8)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append({"path": str(path), "type": "prompt_completion"})
    return {"datasets": paths, "val_set_size": 4}


def test_which_methods_read_them():
    assert task_numbers(AdapterSpec(type="lora")) is None
    assert task_numbers(AdapterSpec(**POLY)) == TaskNumbers(2, "n_tasks")
    assert task_numbers(AdapterSpec(type="multitask_prompt_tuning", num_virtual_tokens=2)) == TaskNumbers(
        1, "num_tasks"
    )


@pytest.mark.parametrize(
    "adapter", [POLY, {"type": "multitask_prompt_tuning", "num_virtual_tokens": 2, "num_tasks": 2}]
)
def test_each_dataset_is_a_task(adapter, tmp_path):
    spec = job(tmp_path, adapter=adapter, data=two_datasets(tmp_path))
    examples = load_examples(spec, load_tokenizer(spec.model), max_len=128)
    assert all(row.task_id == int(row.prompt[0]) for row in [*examples.train, *examples.evaluation])
    assert {row.task_id for row in examples.train} == {0, 1}
    end = train(request(tmp_path, spec, plan()))
    assert end.metrics["eval_loss"] != end.metrics["base.eval_loss"]
    one = job(tmp_path, adapter=adapter, data=two_datasets(tmp_path, task_id=1))
    same = load_examples(one, load_tokenizer(spec.model), max_len=128)
    assert {row.task_id for row in same.train} == {1}
    other = train(request(tmp_path, one, plan(), run="other"))
    first, second = adapter_of(end), adapter_of(other)
    assert any(not first[name].equal(second[name]) for name in first)


def test_other_methods_pass_the_column_over(tmp_path):
    spec = job(tmp_path, data=two_datasets(tmp_path, task_id="HumanEval/0"))
    assert {row.task_id for row in load_examples(spec, load_tokenizer(spec.model), max_len=128).train} == {0}


@pytest.mark.parametrize(
    ("values", "number", "message"),
    [
        ({"task_id": 2}, 0, r"x:1: column 'task_id' holds 2, and the adapter learns 2 tasks, numbered from 0. Set "
                            r"adapter.n_tasks to 3 or more"),
        ({}, 2, r"x:1: its dataset is number 2, and the adapter learns 2 tasks, numbered from 0. Set adapter.n_tasks"),
        ({"task_id": "a"}, 0, r"column 'task_id' holds a str; it must be a whole number"),
        ({"task_id": -1}, 0, r"column 'task_id' holds -1, and the adapter learns 2 tasks"),
        ({"task_id": 1.5}, 0, r"column 'task_id' holds a float"),
    ],
)  # fmt: skip
def test_what_is_refused(values, number, message):
    with pytest.raises(DataError, match=message):
        TaskNumbers(2, "n_tasks").of(SourceRow(values, "x:1"), number)


def test_numbers_of_csv():
    assert TaskNumbers(2, "n_tasks").of(SourceRow({"task_id": "1"}, "x:1"), 0) == 1
