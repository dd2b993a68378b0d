"""Rebuilds what this folder holds, from the running CPython alone: `python jobs/assets/build.py
[data|base|encoder-decoder|all]`.

`data` writes the rows in a second, the same byte for byte on every CPython 3.11; `base` trains the tokenizer and
the model of tiny-llama/ in about a quarter of an hour on two CPU cores, `encoder-decoder` tiny-t5/ over the same
tokenizer in another; each fails where the result is worse than its bound. `--out DIR` writes elsewhere.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import documents
import questions
import task_rows

HERE = Path(__file__).resolve().parent
TASKS = (
    task_rows.classification, task_rows.token_classification, task_rows.qa, task_rows.seq2seq, task_rows.embedding,
)  # fmt: skip


def write(path: Path, rows: list[dict]) -> None:
    """Writes the rows aside, then in place, and says what they are."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(questions.to_jsonl(rows), encoding="utf-8")
    aside.replace(path)
    print(f"{path.name}: {len(rows)} rows, {path.stat().st_size:,} bytes, sha256 {questions.sha256(path)}")


def main() -> None:
    """Parses the command line and builds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["data", "base", "encoder-decoder", "all"], default="all")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write to (default: this one)")
    arguments = parser.parse_args()
    if sys.version_info[:2] != (3, 11) or sys.implementation.name != "cpython":
        raise SystemExit(
            f"The texts are those of CPython 3.11; this is {sys.version.split()[0]}. Use python3.11."
        )
    found = documents.all_documents()
    texts = documents.corpus(found)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.what in ("data", "all"):
        write(arguments.out / "python-docs.jsonl", questions.rows(found, texts))
        write(arguments.out / "python-topics.jsonl", questions.topic_rows(found, texts))
        things = task_rows.things(found, texts)
        for rows in TASKS:
            write(arguments.out / f"python-{rows.__name__.replace('_', '-')}.jsonl", rows(things))
    if arguments.what in ("base", "all"):
        import base  # torch and transformers: not needed for the data

        names = {d.name: base.text_hash(d.source + repr(d.entries)) for d in found if not d.for_rows}
        base.build(names, texts, arguments.out / "tiny-llama")
    if arguments.what in ("encoder-decoder", "all"):
        import encoder_decoder

        llama = arguments.out / "tiny-llama"
        llama = llama if llama.is_dir() else HERE / "tiny-llama"
        encoder_decoder.build(texts, arguments.out / "tiny-t5", llama)


if __name__ == "__main__":
    main()
