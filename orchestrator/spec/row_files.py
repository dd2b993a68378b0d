"""Files of rows, by their endings: those that are read, and those that are known to be something else."""

from __future__ import annotations

import os
import re

READ = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""What may stand behind them."""
PLAIN = (".txt", ".text", ".md", ".rst", ".log")
"""Texts without rows, which are not read either."""
_OTHER = (
    *PLAIN, ".html", ".htm", ".xml", ".yaml", ".yml", ".toml", ".pdf", ".doc", ".docx",
    ".xls", ".xlsx", ".ods", ".zip", ".tar", ".tgz", ".7z", ".arrow", ".feather", ".orc", ".avro", ".pkl", ".pickle",
    ".pt", ".npy", ".npz", ".h5", ".db", ".sqlite", ".py",
)  # fmt: skip


def ending(path: str) -> str:
    """`.jsonl` of `s3://place/ROWS.JSONL.gz?version=1`; empty where a name has none."""
    compressed = "|".join(re.escape(each) for each in COMPRESSED)
    return os.path.splitext(re.sub(rf"({compressed})$", "", path.split("?")[0]))[1].lower()


def unread(path: str) -> str | None:
    """The ending of a file that is not read here; None where it is, or where the name does not say: a folder's, a hub
    id's or a glob's may end in anything else."""
    found = ending(path)
    return found if found in _OTHER else None
