"""Bad input through `raypeft run`: one clear message, a nonzero exit code, no traceback, and nothing left behind.

What the spec alone refuses is tested in `spec/`, what an endpoint refuses in `serve/`, NaN and Ctrl-C in `train/`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator import objects
from orchestrator.cli import app, run_guarded
from orchestrator.keeper import descendants
from orchestrator.objects.failures import explained

BASE = Path(__file__).parents[2] / "jobs" / "assets" / "tiny-llama"
ROWS = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 20
JOB = "model: {base_model: base}\ndata: {datasets: [{path: rows.jsonl}]}\n"


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with a good job, a good base and good rows; each case breaks one thing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYPEFT_HOME", str(tmp_path / "home"))
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "job.yaml").write_text(JOB)
    with tempfile.TemporaryDirectory(prefix="rpt-") as temporary:  # short: Ray's sockets lie below it
        monkeypatch.setenv("TMPDIR", temporary)
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        yield tmp_path


def write(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode()) and None
    )


def cut_weights(folder: Path) -> None:
    weights = folder / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


BEFORE_RAY = {
    "not YAML": (write("job.yaml", "model: [unclosed\n"), (), r"job\.yaml:\d"),
    "a binary file": (write("job.yaml", b"\x00\xff\xfe"), (), r"job\.yaml"),
    "an empty file": (write("job.yaml", ""), (), r"job\.yaml"),
    "an unknown key": (
        write("job.yaml", JOB + "adpter: {}\n"),
        (),
        r"job\.yaml:3 adpter.*Closest: 'adapter'",
    ),
    "a duplicate key": (write("job.yaml", JOB + "model: {base_model: x}\n"), (), r"job\.yaml:3.*line 1"),
    "a wrong type": ((lambda folder: None), ("--set", "training.num_epochs=many"), r"training\.num_epochs"),
    "no such method": ((lambda folder: None), ("--set", "adapter.type=loar"), r"'loar'.*Closest: 'lora'"),
    "no such base": (lambda folder: shutil.rmtree(folder / "base"), (), r"base"),
    "truncated weights": (cut_weights, (), r"model\.safetensors.*(truncated|cut|shorter|bytes)"),
    "no such data": (lambda folder: (folder / "rows.jsonl").unlink(), (), r"rows\.jsonl"),
    "a target that matches nothing": (
        (lambda folder: None),
        ("--set", "adapter.target_modules=[v_prj]"),
        r"'v_prj' matche[sd] none.*'?v_proj'?",
    ),
    "more workers than there ever are": (
        (lambda folder: None),
        ("--set", "resources.num_workers=4096"),
        r"4096",
    ),
    "a cluster that does not answer": (
        (lambda folder: None),
        ("--cluster", "http://127.0.0.1:9"),
        r"127\.0\.0\.1:9",
    ),
    "no such cluster": ((lambda folder: None), ("--cluster", "mars"), r"'mars'.*local"),
}


def left_behind(folder: Path) -> set[str]:
    """Files of the case, temporary files, and processes below this one."""
    files = {str(path) for place in (folder, Path(tempfile.gettempdir())) for path in place.rglob("*")}
    return files | {f"process {pid}" for pid in descendants(os.getpid())}


@pytest.mark.parametrize("case", BEFORE_RAY)
def test_refused_before_anything_starts(workplace, capsys, case):
    spoil, flags, message = BEFORE_RAY[case]
    spoil(workplace)
    before = left_behind(workplace)
    code = run_guarded(app, ["run", "job.yaml", *flags])
    said = capsys.readouterr().err
    assert code != 0 and "Traceback" not in said
    assert matches(message, said), said
    assert left_behind(workplace) - before <= {str(workplace / "home")}


@pytest.mark.parametrize("error", ["EROFS", "ENOSPC", "EACCES"])
def test_a_registry_that_cannot_be_written_is_said_before_training(workplace, capsys, monkeypatch, error):
    def refuse(url):
        number = getattr(errno, error)
        raise explained(OSError(number, os.strerror(number)), str(url))

    monkeypatch.setattr(objects, "check_writable", refuse)
    before = left_behind(workplace)
    code = run_guarded(app, ["run", "job.yaml"])
    said = capsys.readouterr().err
    assert code == 1 and "Traceback" not in said and "registry" in said
    assert left_behind(workplace) - before <= {str(workplace / "home")}


BAD_DATA = {
    "empty": ("", r"rows\.jsonl: holds no row"),
    "a missing column": ('{"message": []}\n' * 5, r"messages"),
    "not UTF-8": (ROWS.encode() + b'{"messages": "\xff\xfe"}\n', r"rows\.jsonl.*UTF-8"),
    "not JSON": (ROWS + "{oops\n", r"rows\.jsonl:21"),
}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_said_once_and_the_local_ray_is_taken_down_again(workplace, case):
    text, message = BAD_DATA[case]
    write("rows.jsonl", text)(workplace)
    before = left_behind(workplace)
    # a process of its own: joining a Ray changes its environment
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "run", "job.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1 and matches(message, done.stderr), done.stderr
    left = {name for name in left_behind(workplace) - before if not name.startswith(str(workplace / "home"))}
    assert not left


def matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.S) is not None
