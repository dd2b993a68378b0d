"""A small job with its base and data on this machine, for tests that never train it."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.spec.job import JobSpec
from orchestrator.spec.load import load_job_mapping


def write_inputs(folder: Path) -> None:
    """`base/` and `rows.jsonl`: enough to be found, hashed and sent."""
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(9)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_job(base: str = "base", data: str = "rows.jsonl", **keys: object) -> JobSpec:
    """A job over these paths; more keys at the top level."""
    values = {"name": "small", "model": {"base_model": base}, "data": {"datasets": [{"path": data}]}, **keys}
    return load_job_mapping(values).spec
