"""How long a job's rows are, and how many labels they name, without torch: from local JSONL files, by the base's own
tokenizer.

For the plan's memory alone. What a row becomes in full is the work of `train.render`.
"""

from __future__ import annotations

import glob
import heapq
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..spec.job import DATASET_FIELDS, DatasetSpec, JobSpec
from ..spec.row_files import READ

_LONGEST_READ = 64
"""Rows that are tokenized: those with most bytes."""

_MOST_BYTES = 256 * 2**20
"""Beyond this the files are not read."""

_TEMPLATE_TOKENS = 6
"""What a chat template adds to a message."""

_COLUMNS = {
    "chat": ("messages", "conversations"),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "input", "output"),
    "text": ("text",),
    "classification": ("text", "text_pair"),
    "token-classification": ("tokens",),
    "qa": ("question", "context"),
    "seq2seq": ("source", "target"),
    "embedding": ("anchor", "positive", "negative"),
}
_SEPARATE = ("seq2seq", "embedding")
"""Types whose texts are sequences of their own."""
_LABELS = {"classification": "label", "token-classification": "tags"}


@dataclass(frozen=True)
class RowFacts:
    """What is known of the rows; None of what is not."""

    longest: int | None = None
    """Tokens of the longest training row."""
    labels: int | None = None
    """How many labels the rows name."""
    count: int | None = None
    """How many rows there are, weights counted."""
    absent: tuple[str, ...] = ()
    """Paths of local files that are not here."""


def row_facts(spec: JobSpec) -> RowFacts:
    """Reads the job's local files; says nothing of others."""
    return RowFacts(longest_row(spec), num_labels(spec), num_rows(spec), absent(spec))


def num_labels(spec: JobSpec) -> int | None:
    """How many labels the rows name; None for other tasks, and where the data is not at hand."""
    found: set[str] = set()
    try:
        for dataset in spec.data.datasets:
            column = getattr(dataset, f"field_{_LABELS[dataset.type]}") or _LABELS[dataset.type]
            for line in _lines(_local_files(dataset)):
                value = json.loads(line)[column]
                found |= set(map(str, value)) if isinstance(value, list) else {str(value)}
    except (OSError, ValueError, KeyError, TypeError):  # reported by whoever needs it
        return None
    return len(found) or None


def num_rows(spec: JobSpec) -> int | None:
    """How many rows the job's datasets have; None where the data is not at hand."""
    try:
        return sum(
            round(dataset.weight * sum(1 for _ in _lines(_local_files(dataset))))
            for dataset in spec.data.datasets
        )
    except (OSError, ValueError):
        return None


def absent(spec: JobSpec) -> tuple[str, ...]:
    """The datasets' paths that can only be a local file's, and match none."""
    paths = (dataset.path for dataset in (*spec.data.datasets, *spec.eval.datasets))
    return tuple(path for path in paths if _is_local_file(path) and not glob.glob(os.path.expanduser(path)))


def longest_row(spec: JobSpec) -> int | None:
    """Tokens of the longest training row; None where the data or the tokenizer is not at hand."""
    tokenizer = Path(spec.model.base_model).expanduser() / "tokenizer.json"
    try:
        if not tokenizer.is_file():
            return None
        lines = [(dataset, line) for dataset in spec.data.datasets for line in _longest_lines(dataset)]
        encoder = Tokenizer.from_file(str(tokenizer))
        return max(_tokens(encoder, dataset, json.loads(line)) for dataset, line in lines)
    except (
        Exception
    ):  # a file that cannot be read here is reported by whoever needs it; tokenizers raises bare ones
        return None


def _longest_lines(dataset: DatasetSpec) -> list[bytes]:
    return heapq.nlargest(_LONGEST_READ, _lines(_local_files(dataset)), key=len)


def _is_local_file(path: str) -> bool:
    """A name without an ending may be a dataset's of the hub."""
    is_file = path.startswith(("/", "~", "./", "../")) or path.endswith(READ)
    return is_file and "://" not in path


def _local_files(dataset: DatasetSpec) -> list[Path]:
    paths = [Path(name) for name in glob.glob(os.path.expanduser(dataset.path))]
    if not paths or any(path.suffix not in (".jsonl", ".ndjson") for path in paths):
        raise OSError(dataset.path)
    if sum(path.stat().st_size for path in paths) > _MOST_BYTES:
        raise OSError(dataset.path)
    return paths


def _lines(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as lines:
            yield from (line for line in lines if line.strip())


def _tokens(encoder: Tokenizer, dataset: DatasetSpec, row: dict[str, Any]) -> int:
    kept = [
        name
        for name in DATASET_FIELDS[dataset.type]
        if name not in ("field_label", "field_tags", "field_answers")
    ]
    renamed = [getattr(dataset, name) for name in kept]
    columns = [name for name in renamed if name] or list(_COLUMNS[dataset.type])
    columns += [name for name in _COLUMNS[dataset.type] if name in row]
    texts = [text for column in dict.fromkeys(columns) if column in row for text in _texts(row[column])]
    if dataset.type == "token-classification":
        texts = [" ".join(texts)]
    lengths = [len(encoder.encode(text, add_special_tokens=False).ids) + _TEMPLATE_TOKENS for text in texts]
    return max(lengths) if dataset.type in _SEPARATE else sum(lengths)


def _texts(value: Any) -> Iterator[str]:
    """The texts of a column: itself, or the contents of its messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, dict):
        yield from _texts(value.get("content", value.get("value")))
