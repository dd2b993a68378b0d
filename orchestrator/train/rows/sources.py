"""A dataset's path -> its rows, each with the place it comes from.

JSON lines and CSV are read line by line by ourselves: values stay as written (a reader that guesses types
turns `2020-01-01` into a time and `NA` into nothing), and what is wrong is named with its line. Parquet goes
through pyarrow, hub ids and saved datasets through `datasets`, which runs no code of a repository. Nothing
local touches the network.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from orchestrator.errors import DataError, closest, first_line
from orchestrator.spec.job import DatasetSpec
from orchestrator.spec.row_files import ending
from peft_dist.lazy import lazy

datasets = lazy("datasets")
parquet = lazy("pyarrow.parquet")

JSON_KINDS = {
    list: "array",
    str: "text",
    int: "number",
    float: "number",
    bool: "truth value",
    type(None): "null",
}
SPLIT_NAMES = {
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "training": "train",
    "eval": "test",
}
csv.field_size_limit(2**31 - 1)


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row: its columns and `file:line` (or `file: row N`), for messages."""

    values: dict[str, Any]
    where: str


def read_rows(dataset: DatasetSpec) -> Iterator[SourceRow]:
    """Yields the rows of `dataset.path` in a fixed order: files by name, rows as they stand.

    Raises DataError where the path matches nothing, a file cannot be read, is not UTF-8 or malformed.
    """
    path = os.path.expanduser(dataset.path)
    if "://" in path:
        files = _remote_files(path, dataset.split)
    elif os.path.isdir(path):
        if _is_saved_dataset(path):
            yield from _saved_rows(path, dataset.split)
            return
        files = _of_split(_files_below(path), dataset.split, path)
    elif os.path.isfile(path):
        files = [path]
    elif glob.has_magic(path):
        files = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    elif _may_be_hub_id(path):
        yield from _hub_rows(path, dataset.split)
        return
    else:
        files = []
    if not files:
        raise DataError("matches no file.", where=path, hint=_near(path))
    for name in files:
        yield from _reader(name)(name)


def _near(path: str) -> str:
    """What lies beside a local path that does not exist."""
    folder = os.path.dirname(path) or "."
    while not os.path.isdir(folder) and os.path.dirname(folder) not in ("", folder):
        folder = os.path.dirname(folder)
    if "://" in path or not os.path.isdir(folder):
        return "Check the path in data.datasets."
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    similar = closest(os.path.basename(path), names, limit=3)
    if similar:
        return f"Closest in {folder}: {', '.join(similar)}."
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{os.path.abspath(folder)} holds {shown or 'nothing'}."


# ---- finding files


def _remote_files(path: str, split: str) -> list[str]:
    protocol = path.split("://")[0]
    try:
        fs, root = url_to_fs(path)
        if glob.has_magic(root):
            return sorted(fs.unstrip_protocol(name) for name in fs.glob(root) if fs.isfile(name))
        if fs.isfile(root):
            return [path]
        if protocol in ("http", "https"):
            return []
        found = [fs.unstrip_protocol(name) for name in sorted(fs.find(root)) if _known(name)]
        return _of_split(found, split, path)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"cannot be listed: {first_line(error)}",
            where=path,
            hint="Check the address, the credentials, and that the package for this storage is installed.",
        ) from error


def _files_below(folder: str) -> list[str]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        found += [os.path.join(place, name) for name in names if not name.startswith((".", "_"))]
    return sorted(name for name in found if _known(name))


def _of_split(files: list[str], split: str, path: str) -> list[str]:
    """The files of one split, where file or folder names tell splits apart; else all of them are `train`."""
    named = {name: _split_in(name, path, split) for name in files}
    present = sorted({found for found in named.values() if found})
    wanted = SPLIT_NAMES.get(split, split)
    if not present:
        if files and wanted != "train":
            raise DataError(
                f"has no split '{split}': its file names tell no splits apart.",
                where=path,
                hint="Leave out `split`, or put the files of each split into a folder of its name.",
            )
        return files
    chosen = [name for name in files if named[name] == wanted]
    if not chosen:
        raise DataError(f"has no split '{split}'.", where=path, hint=f"Splits there: {', '.join(present)}.")
    return chosen


def _split_in(name: str, root: str, split: str) -> str | None:
    inside = name[len(root) :] if name.startswith(root) else name
    words = re.split(r"[^a-z0-9]+", inside.lower())
    for word in words:
        if word in ("train", "test", "validation", *SPLIT_NAMES) or word == split.lower():
            return SPLIT_NAMES.get(word, word)
    return None


def _is_saved_dataset(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def _may_be_hub_id(path: str) -> bool:
    if ending(path) in READERS or path.endswith(".txt"):
        return False
    return re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", path) is not None


# ---- reading files


def _known(name: str) -> bool:
    return ending(name) in READERS and os.path.basename(name) not in ("dataset_info.json", "state.json")


def _reader(name: str) -> Callable[[str], Iterator[SourceRow]]:
    try:
        return READERS[ending(name)]
    except KeyError:
        kinds = ", ".join(sorted(READERS))
        raise DataError(
            f"is no kind of file that is read here: {kinds} (also .gz, .bz2, .xz).",
            where=name,
            hint="Convert it, or name it by what it holds.",
        ) from None


def _open(name: str) -> IO[bytes]:
    try:
        return fsspec.open(name, "rb", compression="infer").open()
    except Exception as error:
        raise DataError(f"cannot be read: {first_line(error)}", where=name) from error


def _lines(name: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its newline) of a UTF-8 file."""
    with _open(name) as file:
        offset = 0
        try:
            for number, line in enumerate(file, start=1):
                yield number, _decoded(line, name, number, offset)
                offset += len(line)
        except (OSError, EOFError) as error:
            raise DataError(f"cannot be read: {first_line(error)}", where=name) from error


def _decoded(line: bytes, name: str, number: int, offset: int) -> str:
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = line[error.start]
        raise DataError(
            f"is not UTF-8: byte 0x{bad:02x} at offset {offset + error.start} of the file.",
            where=f"{name}:{number}",
            hint="Convert it: iconv -f latin1 -t utf-8 FILE > NEW (latin1 or whatever it is in).",
        ) from None


def _json_lines(name: str) -> Iterator[SourceRow]:
    for number, line in _lines(name):
        if line.strip():
            yield _object(_parsed(line, name, number), f"{name}:{number}")


def _json_file(name: str) -> Iterator[SourceRow]:
    """A list of objects, an object with one such list, or JSON lines under another name."""
    text = "".join(line for _, line in _lines(name))
    if not text.strip():
        return
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("[") or error.msg != "Extra data":
            raise DataError(f"is not JSON: {error.msg}.", where=f"{name}:{error.lineno}") from None
        yield from _json_lines(name)
        return
    rows = _listed(whole)
    for number, value in enumerate(rows, start=1):
        yield _object(value, f"{name}: row {number}")


def _listed(whole: Any) -> list[Any]:
    """The rows of a JSON document: a list, `{"data": [...]}` (objects under any one name), or one row."""
    if not isinstance(whole, dict):
        return whole if isinstance(whole, list) else [whole]
    lists = [value for value in whole.values() if isinstance(value, list)]
    is_row = bool({"messages", "conversations"} & set(whole))
    if len(lists) == 1 and not is_row and all(isinstance(value, dict) for value in lists[0]):
        return lists[0]
    return [whole]


def _parsed(line: str, name: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        shown = line.strip()[:60]
        raise DataError(
            f"is not JSON: {error.msg} (column {error.colno}): {shown!r}.",
            where=f"{name}:{number}",
            hint="Each line of a JSONL file is one object.",
        ) from None
    except RecursionError:
        raise DataError("is nested too deeply.", where=f"{name}:{number}") from None


def _object(value: Any, where: str) -> SourceRow:
    if not isinstance(value, dict):
        raise DataError(f"is no object of columns but a JSON {JSON_KINDS[type(value)]}.", where=where)
    return SourceRow(value, where)


def _separated(name: str, delimiter: str) -> Iterator[SourceRow]:
    reader = csv.reader((line for _, line in _lines(name)), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        for cells in reader:
            where = f"{name}:{reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header or ()):
                raise DataError(
                    f"has {len(cells)} cells where the header has {len(header or ())}.",
                    where=where,
                    hint="Put quotes around a cell that holds the separator or a line break.",
                )
            yield SourceRow(dict(zip(header or (), cells, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"is not CSV: {error}.", where=f"{name}:{reader.line_num}") from None


def _comma_separated(name: str) -> Iterator[SourceRow]:
    return _separated(name, ",")


def _tab_separated(name: str) -> Iterator[SourceRow]:
    return _separated(name, "\t")


def _parquet(name: str) -> Iterator[SourceRow]:
    with _open(name) as file:
        number = 0
        try:
            for batch in parquet.ParquetFile(file).iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield SourceRow(values, f"{name}: row {number}")
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these two
            raise DataError(f"is not a readable Parquet file: {first_line(error)}", where=name) from error


READERS: dict[str, Callable[[str], Iterator[SourceRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
    ".parquet": _parquet,
}


# ---- datasets of the library


def _saved_rows(folder: str, split: str) -> Iterator[SourceRow]:
    """Rows that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    try:
        loaded = datasets.load_from_disk(folder)
    except Exception as error:
        raise DataError(f"is not a readable saved dataset: {first_line(error)}", where=folder) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"has no split '{split}'.", where=folder, hint=f"Splits there: {', '.join(loaded)}."
            )
        loaded = loaded[split]
    yield from _dataset_rows(loaded, folder)


def _hub_rows(name: str, split: str) -> Iterator[SourceRow]:
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise DataError(
            f"is neither a file here nor a dataset of the hub with a split '{split}': {first_line(error)}",
            where=name,
            hint=_near(name),
        ) from error
    finally:
        if not shown:
            datasets.enable_progress_bars()
    yield from _dataset_rows(loaded, f"{name}[{split}]")


def _dataset_rows(loaded: Any, name: str) -> Iterator[SourceRow]:
    for number, values in enumerate(loaded, start=1):
        yield SourceRow(dict(values), f"{name}: row {number}")
