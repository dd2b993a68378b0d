"""Columns and messages: every type, every override, and each way in which a row can be wrong."""

import json

import pytest

from orchestrator.errors import DataError
from orchestrator.spec.job import DatasetSpec
from orchestrator.train.rows.records import ALPACA, ALPACA_WITH_INPUT, records
from orchestrator.train.rows.sources import SourceRow

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def record(values, type="chat", **fields):
    dataset = DatasetSpec(path="x.jsonl", type=type, **fields)
    return next(records([SourceRow(values, "x.jsonl:7")], dataset))


def failure(values, type="chat", **fields) -> str:
    with pytest.raises(DataError) as caught:
        record(values, type, **fields)
    return str(caught.value)


def test_both_spellings_of_a_chat_are_one_content():
    one, other = record({"messages": MESSAGES}), record({"conversations": SHAREGPT, "id": 3})
    assert list(one.messages) == MESSAGES
    assert (one.messages, one.row_hash) == (other.messages, other.row_hash)


def test_column_of_the_messages_may_have_another_name_or_be_json_text():
    assert list(record({"talk": MESSAGES}, field_messages="talk").messages) == MESSAGES
    assert list(record({"messages": json.dumps(SHAREGPT)}).messages) == MESSAGES


def test_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "c"}]
    assert record({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "ac"


def test_prompt_completion_and_its_columns():
    made = record({"prompt": "p ", "completion": "c"}, "prompt_completion")
    assert (made.prompt, made.answer, made.messages) == ("p ", "c", None)
    other = record({"q": "p ", "a": "c"}, "prompt_completion", field_prompt="q", field_completion="a")
    assert other.row_hash == made.row_hash
    assert record({"prompt": 1, "completion": 2.5}, "prompt_completion").answer == "2.5"


def test_alpaca_with_and_without_input():
    made = record({"instruction": "Add {input}", "input": "1 {output}", "output": "2"}, "alpaca")
    assert made.prompt == ALPACA_WITH_INPUT.format(instruction="Add {input}", input="1 {output}")
    assert made.answer == "2"
    for row in ({}, {"input": ""}, {"input": None}, {"input": " "}):
        made = record({"instruction": "Add", "output": "2", **row}, "alpaca")
        assert made.prompt == ALPACA.format(instruction="Add")
    made = record(
        {"i": "Add", "n": "1", "o": "2"},
        "alpaca",
        field_instruction="i",
        field_input="n",
        field_output="o",
    )
    assert made.prompt == ALPACA_WITH_INPUT.format(instruction="Add", input="1") and made.answer == "2"


def test_text_and_its_column():
    assert record({"text": "t"}, "text").answer == "t"
    assert record({"body": "t"}, "text", field_text="body").prompt == ""


def test_hash_is_over_content_alone():
    same = {record({"messages": MESSAGES, "id": i}).row_hash for i in range(3)}
    assert len(same) == 1
    others = [
        record({"messages": [*MESSAGES, *MESSAGES]}),
        record({"messages": MESSAGES[:1]}),
        record({"prompt": "a", "completion": "b"}, "prompt_completion"),
        record({"prompt": "ab", "completion": ""}, "prompt_completion"),
        record({"text": "ab"}, "text"),
        record({"text": "ab "}, "text"),
    ]
    assert len({made.row_hash for made in others} | same) == len(others) + 1
    assert all(len(made.row_hash) == 64 for made in others)


def test_missing_column_names_those_there_and_the_closest():
    assert failure({"message": MESSAGES, "id": 1}) == (
        "x.jsonl:7: has no column 'messages', which type 'chat' reads. Columns there: 'message', 'id'. "
        "Closest: 'message'. Name another column with `field_messages: COLUMN`, or set another `type`."
    )
    assert failure({"a": "x"}, "text", field_text="body") == (
        "x.jsonl:7: has no column 'body', which type 'text' reads. Columns there: 'a'. "
        "Name another column with `field_text: COLUMN`, or set another `type`."
    )
    assert failure({"text": "x"}) == (
        "x.jsonl:7: has no column 'messages', which type 'chat' reads. Columns there: 'text'. They are those of "
        "`type: text`. Name another column with `field_messages: COLUMN`, or set another `type`."
    )
    assert "has no column 'nope'" in failure({"messages": MESSAGES}, field_messages="nope")
    for type, columns in (
        ("prompt_completion", ["prompt", "completion"]),
        ("alpaca", ["instruction", "output"]),
    ):
        for absent in columns:
            row = {name: "x" for name in columns if name != absent}
            assert f"has no column {absent!r}, which type '{type}' reads" in failure(row, type)


@pytest.mark.parametrize("value", [None, True, ["a"], {"a": 1}])
def test_column_that_is_no_text(value):
    kind = "nothing (null)" if value is None else f"a {type(value).__name__}"
    assert failure({"text": value}, "text") == f"x.jsonl:7: column 'text' holds {kind}; it must be a text."


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (None, "column 'messages' holds nothing (null)."),
        (3, "column 'messages' holds an int."),
        ("hello", "column 'messages' is a text that is not JSON."),
        ([], "column 'messages' is an empty list."),
        (["a"], "message 1 of column 'messages' is a str."),
        ([{"role": "user"}], "message 1 of column 'messages' has no 'content', only 'role'."),
        ([MESSAGES[0], {"content": "b"}], "message 2 of column 'messages' has no 'role', only 'content'."),
        (
            [{"role": "usr", "content": "a"}],
            "message 1 of column 'messages' has the role 'usr'; closest: 'user'.",
        ),
        ([{"role": "user", "content": 4}], "message 1 of column 'messages' has an int for its content."),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "message 1 of column 'messages' has content parts that are not text.",
        ),
    ],
)
def test_malformed_messages_name_the_row_and_the_message(messages, problem):
    assert failure({"messages": messages}) == (
        f'x.jsonl:7: {problem} Messages are a list of {{"role", "content"}} (or {{"from", "value"}}) '
        "with texts; roles: assistant, system, tool, user."
    )
