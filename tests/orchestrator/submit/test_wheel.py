"""The project as a wheel: whole, importable from a clean interpreter, the same bytes each time."""

import base64
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from orchestrator.submit import wheel
from orchestrator.submit.wheel import build_wheel, requirements


@pytest.fixture(scope="module")
def archive():
    return zipfile.ZipFile(io.BytesIO(build_wheel()[1]))


def test_it_is_named_as_wheels_are():
    name, _ = build_wheel()
    assert name == f"raypeft-{wheel._distribution().version}-py3-none-any.whl"


def test_it_is_the_same_each_time():
    assert build_wheel() == build_wheel()


def test_it_holds_every_file_of_both_packages(archive, repository):
    names = set(archive.namelist())
    for package in ("orchestrator", "peft_dist"):
        for path in (repository / package).rglob("*.py"):
            assert path.relative_to(repository).as_posix() in names
    assert not [name for name in names if "__pycache__" in name]


def test_its_record_is_right(archive):
    record = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
    listed = [line.rsplit(",", 2) for line in archive.read(record).decode().splitlines()]
    assert {name for name, _, _ in listed} == set(archive.namelist())
    for name, digest, size in listed:
        if name != record:
            content = archive.read(name)
            right = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert (digest, size) == (f"sha256={right}", str(len(content)))


def test_pip_takes_it(tmp_path):
    """pip reads tags, metadata and record, and refuses a wheel in which they do not fit."""
    name, content = build_wheel()
    (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    subprocess.run([*command, str(tmp_path / "into"), str(tmp_path / name)], check=True)
    assert (tmp_path / "into" / "orchestrator" / "submit" / "wheel.py").is_file()


def test_a_clean_interpreter_imports_it(tmp_path):
    _, content = build_wheel()
    zipfile.ZipFile(io.BytesIO(content)).extractall(tmp_path)
    code = "import orchestrator.errors as e, orchestrator.submit.sealing as s; print(e.__file__, s.__file__)"
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(Path(path).is_relative_to(tmp_path) for path in found.stdout.split())


def test_what_it_needs_leaves_out_what_only_tests_need():
    needed = requirements()
    assert any(line.startswith("ray[") for line in needed)
    assert not [line for line in needed if "pytest" in line]
