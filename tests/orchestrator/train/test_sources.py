"""Paths -> rows: every kind of place and file, values exactly as written, and what is wrong named with its
line."""

import csv
import gzip
import json
import os
import types

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from orchestrator.errors import DataError
from orchestrator.spec.job import DatasetSpec
from orchestrator.spec.row_files import READ
from orchestrator.train.rows import sources
from orchestrator.train.rows.sources import read_rows
from tests.orchestrator.s3 import Bucket, s3_bucket, s3_endpoint  # noqa: F401

ROWS = [{"text": "2020-01-01", "n": 1}, {"text": "NA", "n": None}, {"text": "ü\u2028x", "n": 3}]


def read(path, **spec):
    return list(read_rows(DatasetSpec(path=str(path), type="text", **spec)))


def values(path, **spec):
    return [row.values for row in read(path, **spec)]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def failure(path, **spec) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **spec)
    return str(caught.value)


def test_jsonl_keeps_values_as_written_and_counts_lines_not_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "2020-01-01"}\n\n  \n{"text": "a\u2028b"}', encoding="utf-8")
    assert [(row.values["text"], row.where) for row in read(path)] == [
        ("2020-01-01", f"{path}:1"),
        ("a\u2028b", f"{path}:4"),
    ]


def test_a_path_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl")
    assert values("~/a.jsonl") == ROWS and values("~/*.jsonl") == ROWS


def test_json_document_may_be_a_list_a_wrapped_list_one_row_or_lines(tmp_path):
    path = tmp_path / "a.json"
    for text in (
        json.dumps(ROWS),
        json.dumps({"data": ROWS}),
        json.dumps({"version": "1", "rows": ROWS}, indent=2),
    ):
        path.write_text(text)
        assert values(path) == ROWS
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert values(path) == ROWS
    one = {"messages": [{"role": "user", "content": "a"}]}
    path.write_text(json.dumps(one))
    assert values(path) == [one]


def test_csv_guesses_no_types(tmp_path):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "n"], ["007", "NA"], ['a, "b"\nc', ""]])
    rows = read(path)
    assert [row.values for row in rows] == [{"text": "007", "n": "NA"}, {"text": 'a, "b"\nc', "n": ""}]
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:4"]
    (tmp_path / "a.tsv").write_text("text\tn\na, b\t1\n")
    assert values(tmp_path / "a.tsv") == [{"text": "a, b", "n": "1"}]


def test_csv_cell_may_be_longer_than_pythons_default_limit(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(values(path)[0]["text"]) == 200_000


def test_parquet_rows(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert [row.values for row in rows] == ROWS
    assert rows[2].where == f"{tmp_path / 'a.parquet'}: row 3"


def test_compressed_jsonl(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "a"}\n')
    assert values(tmp_path / "a.jsonl.gz") == [{"text": "a"}]


def test_directory_and_glob_read_files_by_name_and_skip_others(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "deep" / "c.jsonl", [{"text": "c"}])
    write_jsonl(tmp_path / ".hidden" / "d.jsonl", [{"text": "d"}])
    (tmp_path / "README.md").write_text("x")
    assert [row["text"] for row in values(tmp_path)] == ["a", "b", "c"]
    assert [row["text"] for row in values(tmp_path / "*.jsonl")] == ["a", "b"]
    assert [row["text"] for row in values(tmp_path / "**" / "*.jsonl")] == ["a", "b", "c"]


def test_directory_of_splits_reads_the_one_that_is_asked_for(tmp_path):
    write_jsonl(tmp_path / "train-00000-of-00001.jsonl", [{"text": "a"}])
    (tmp_path / "val").mkdir()
    write_jsonl(tmp_path / "val" / "x.jsonl", [{"text": "b"}])
    assert values(tmp_path) == [{"text": "a"}]
    assert values(tmp_path, split="validation") == [{"text": "b"}]
    message = failure(tmp_path, split="test")
    assert message == f"{tmp_path}: has no split 'test'. Splits there: train, validation."


def test_split_of_a_directory_without_splits_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    assert failure(tmp_path, split="test") == (
        f"{tmp_path}: has no split 'test': its file names tell no splits apart. "
        "Leave out `split`, or put the files of each split into a folder of its name."
    )


def test_fsspec_urls_of_files_folders_and_globs(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe({"/corpus/a.jsonl": b'{"text": "a"}\n', "/corpus/b.jsonl": b'{"text": "b"}\n'})
    try:
        assert values("memory://corpus/a.jsonl") == [{"text": "a"}]
        assert [row["text"] for row in values("memory://corpus")] == ["a", "b"]
        rows = read("memory://corpus/*.jsonl")
        assert [row.values["text"] for row in rows] == ["a", "b"]
        assert rows[1].where.endswith("corpus/b.jsonl:1")
        assert failure("memory://corpus/*.csv") == (
            "memory://corpus/*.csv: matches no file. Check the path in data.datasets."
        )
    finally:
        fs.rm("/corpus", recursive=True)
    assert values(f"file://{write_jsonl(tmp_path / 'a.jsonl')}") == ROWS


def test_s3(s3_bucket: Bucket):  # noqa: F811
    for name in ("x", "y"):
        s3_bucket.client.put_object(
            Bucket=s3_bucket.name, Key=f"a/{name}.jsonl", Body=b'{"text": "%s"}\n' % name.encode()
        )
    assert [row["text"] for row in values(f"{s3_bucket.url}/a/*.jsonl")] == ["x", "y"]
    assert [row["text"] for row in values(f"{s3_bucket.url}/a")] == ["x", "y"]
    assert values(f"{s3_bucket.url}/a/x.jsonl") == [{"text": "x"}]


def test_unknown_protocol_says_what_to_do():
    message = failure("nosuch://bucket/a.jsonl")
    assert message.startswith("nosuch://bucket/a.jsonl: cannot be listed: Protocol not known: nosuch")
    assert "the package for this storage is installed" in message


def test_path_that_matches_nothing_names_the_closest(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")
    wrong = tmp_path / "trian.jsonl"
    assert failure(wrong) == f"{wrong}: matches no file. Closest in {tmp_path}: train.jsonl."
    lost = tmp_path / "nowhere" / "zzz.csv"
    assert failure(lost) == f"{lost}: matches no file. {tmp_path} holds train.jsonl."
    assert failure(tmp_path / "*.parquet").endswith(f"{tmp_path} holds train.jsonl.")


def test_malformed_json_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": }\n')
    assert failure(path) == (
        f"{path}:2: is not JSON: Expecting value (column 10): '{{\"text\": }}'. "
        "Each line of a JSONL file is one object."
    )
    path.write_text('{"text": "a"}\n[1]\n')
    assert failure(path) == f"{path}:2: is no object of columns but a JSON array."


def test_malformed_json_document_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n {"text": }]')
    assert failure(path) == f"{path}:2: is not JSON: Expecting value."


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "json"])
def test_not_utf8_names_line_and_offset(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    message = f"{path}:2: is not UTF-8: byte 0xe9 at offset 27 of the file. Convert it: iconv"
    assert failure(path).startswith(message)


def test_csv_with_a_short_row_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,n\na,1\nb\n")
    assert failure(path) == (
        f"{path}:3: has 1 cells where the header has 2. "
        "Put quotes around a cell that holds the separator or a line break."
    )
    path.write_text('text,n\na,"1\n')
    assert failure(path).startswith(f"{path}:2: is not CSV: unexpected end of data")


def test_what_a_job_may_name_is_what_is_read():
    assert set(READ) == set(sources.READERS)


def test_file_of_another_kind_or_damaged(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    assert "is no kind of file that is read here: .csv, .json, .jsonl" in failure(tmp_path / "a.docx")
    (tmp_path / "a.parquet").write_text("x")
    assert "is not a readable Parquet file" in failure(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_text("x")
    assert "cannot be read: Not a gzipped file" in failure(tmp_path / "a.jsonl.gz")


def test_local_rows_leave_nothing_behind_and_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "a.jsonl")
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("a connection was opened"))
    assert values(data) == ROWS
    assert sorted(os.listdir(tmp_path)) == ["data"] and os.listdir(data) == ["a.jsonl"]


def test_saved_dataset(tmp_path):
    import datasets

    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    train.save_to_disk(tmp_path / "one")
    assert values(tmp_path / "one") == ROWS
    assert values(tmp_path / "two") == ROWS
    assert values(tmp_path / "two", split="test") == ROWS[:1]
    assert failure(tmp_path / "two", split="dev").endswith("has no split 'dev'. Splits there: train, test.")


def test_hub_id_goes_to_datasets_by_name_and_split_alone(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return ROWS

    stand_in = types.SimpleNamespace(
        load_dataset=load_dataset,
        are_progress_bars_disabled=lambda: True,
        disable_progress_bars=lambda: None,
    )
    monkeypatch.setattr(sources, "datasets", stand_in)
    rows = read("somebody/rows", split="test")
    assert [row.values for row in rows] == ROWS
    assert rows[0].where == "somebody/rows[test]: row 1"
    assert asked == [(("somebody/rows",), {"split": "test"})]


def test_hub_id_that_cannot_be_loaded():
    message = failure("nobody/no-such-dataset")
    assert message.startswith(
        "nobody/no-such-dataset: is neither a file here nor a dataset of the hub with a split 'train': "
    )
