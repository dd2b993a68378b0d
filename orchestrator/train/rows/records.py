"""Rows of the causal dataset types -> records: the columns picked, checked and brought into one of three forms.
Other tasks read theirs (`tasks/`) through `present` and `text_in`.

`chat` and the ShareGPT spelling become messages; `prompt_completion` and `alpaca` a prompt with its answer;
`text` an answer without a prompt. A record's hash is over that content alone: neither its place, nor other
columns, nor the spelling of roles changes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import DataError, closest
from orchestrator.spec.job import DatasetSpec

from .sources import SourceRow

Message = dict[str, Any]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True)
class Record:
    """One row's content: `messages`, or a `prompt` (maybe empty) with its `answer`."""

    where: str
    row_hash: str
    """sha256 over the content, hexadecimal."""
    messages: tuple[Message, ...] | None = None
    prompt: str = ""
    answer: str = ""


def records(rows: Iterable[SourceRow], dataset: DatasetSpec) -> Iterator[Record]:
    """Yields a record for each row, in order; raises DataError naming the row that does not fit
    `dataset.type`."""
    for row in rows:
        yield record(row, dataset)


def record(row: SourceRow, dataset: DatasetSpec) -> Record:
    """Likewise for one row."""
    return TYPES[dataset.type](row, dataset)


def _chat(row: SourceRow, dataset: DatasetSpec) -> Record:
    if dataset.field_messages:
        name = present(row, "messages", dataset.field_messages, dataset)
    else:
        name = (
            "conversations" if "messages" not in row.values and "conversations" in row.values else "messages"
        )
        present(row, "messages", name, dataset)
    messages = tuple(_messages(row.values[name], name, row.where))
    return Record(
        row.where, hash_of("chat", [[m["role"], m["content"]] for m in messages]), messages=messages
    )


def _prompt_completion(row: SourceRow, dataset: DatasetSpec) -> Record:
    prompt = text_in(row, "prompt", dataset.field_prompt, dataset)
    answer = text_in(row, "completion", dataset.field_completion, dataset)
    return Record(row.where, hash_of("pair", [prompt, answer]), prompt=prompt, answer=answer)


def _alpaca(row: SourceRow, dataset: DatasetSpec) -> Record:
    instruction = text_in(row, "instruction", dataset.field_instruction, dataset)
    answer = text_in(row, "output", dataset.field_output, dataset)
    given = ""
    if dataset.field_input or row.values.get("input") is not None:
        given = text_in(row, "input", dataset.field_input, dataset, none_is_empty=True)
    template = ALPACA_WITH_INPUT if given.strip() else ALPACA
    prompt = template.replace("{instruction}", instruction, 1)
    prompt = given.join(prompt.rsplit("{input}", 1)) if given.strip() else prompt
    return Record(row.where, hash_of("alpaca", [instruction, given, answer]), prompt=prompt, answer=answer)


def _plain(row: SourceRow, dataset: DatasetSpec) -> Record:
    text = text_in(row, "text", dataset.field_text, dataset)
    return Record(row.where, hash_of("text", text), answer=text)


TYPES: dict[str, Callable[[SourceRow, DatasetSpec], Record]] = {
    "chat": _chat,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _plain,
}


COLUMNS = {
    "chat": ({"messages"}, {"conversations"}),
    "prompt_completion": ({"prompt", "completion"},),
    "alpaca": ({"instruction", "output"},),
    "classification": ({"text", "label"},),
    "token-classification": ({"tokens", "tags"},),
    "qa": ({"question", "context", "answers"},),
    "seq2seq": ({"source", "target"},),
    "embedding": ({"anchor", "positive"},),
    "text": ({"text"},),
}
"""The columns that each type cannot do without, in the order in which they are recognised."""


def present(row: SourceRow, role: str, name: str, dataset: DatasetSpec) -> str:
    """`name`, where the row has that column."""
    if name in row.values:
        return name
    there = ", ".join(map(repr, row.values)) or "none"
    near = closest(name, row.values)
    hint = f"Closest: {near[0]!r}. " if near else ""
    fitting = [
        type for type, choices in COLUMNS.items() if any(names <= set(row.values) for names in choices)
    ]
    if fitting and fitting[0] != dataset.type:
        hint = f"They are those of `type: {fitting[0]}`. "
    raise DataError(
        f"has no column {name!r}, which type '{dataset.type}' reads. Columns there: {there}.",
        where=row.where,
        hint=f"{hint}Name another column with `field_{role}: COLUMN`, or set another `type`.",
    )


def text_in(
    row: SourceRow, role: str, override: str | None, dataset: DatasetSpec, *, none_is_empty: bool = False
) -> str:
    """The text in the column `role`, or in `override` where the dataset names another; numbers as text."""
    name = present(row, role, override or role, dataset)
    value = row.values[name]
    if value is None and none_is_empty:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"column {name!r} holds {kind_of(value)}; it must be a text.", where=row.where)
    return value if isinstance(value, str) else str(value)


def _messages(value: Any, column: str, where: str) -> Iterator[Message]:
    if isinstance(value, str):  # CSV has no lists
        try:
            value = json.loads(value)
        except ValueError:
            raise _malformed(where, f"column {column!r} is a text that is not JSON") from None
    if not isinstance(value, list | tuple):
        raise _malformed(where, f"column {column!r} holds {kind_of(value)}")
    if not value:
        raise _malformed(where, f"column {column!r} is an empty list")
    for number, message in enumerate(value, start=1):
        yield _message(message, f"message {number} of column {column!r}", where)


def _message(message: Any, which: str, where: str) -> Message:
    if not isinstance(message, dict):
        raise _malformed(where, f"{which} is {kind_of(message)}")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if role is None or content is None:
        missing = "role" if role is None else "content"
        raise _malformed(
            where, f"{which} has no {missing!r}, only {', '.join(map(repr, message)) or 'nothing'}"
        )
    if not isinstance(role, str) or role.lower() not in ROLES:
        near = closest(str(role), ROLES)
        raise _malformed(
            where, f"{which} has the role {role!r}" + (f"; closest: {near[0]!r}" if near else "")
        )
    if isinstance(content, list):
        content = _joined(content, which, where)
    if not isinstance(content, str):
        raise _malformed(where, f"{which} has {kind_of(content)} for its content")
    return {"role": ROLES[role.lower()], "content": content}


def _joined(parts: list[Any], which: str, where: str) -> str:
    """OpenAI's list of `{"type": "text", "text": ...}` parts as one text."""
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        for part in parts
    ]
    if not all(isinstance(text, str) for text in texts):
        raise _malformed(where, f"{which} has content parts that are not text")
    return "".join(text for text in texts if text is not None)


def _malformed(where: str, problem: str) -> DataError:
    roles = ", ".join(sorted(set(ROLES.values())))
    return DataError(
        f"{problem}.",
        where=where,
        hint='Messages are a list of {"role", "content"} (or {"from", "value"}) with texts; '
        + f"roles: {roles}.",
    )


def kind_of(value: Any) -> str:
    """`a list`, `an int`, `nothing (null)`."""
    if value is None:
        return "nothing (null)"
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def hash_of(kind: str, content: Any) -> str:
    """sha256 over a row's content, hexadecimal."""
    text = json.dumps([kind, content], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
