"""Fixtures of the orchestrator's tests that need no Ray."""

from pathlib import Path

import pytest

from orchestrator.cli import app, run_guarded

from .s3 import s3_bucket, s3_endpoint

__all__ = ["place", "raypeft", "s3_bucket", "s3_endpoint"]


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder on each kind of storage."""
    if request.param == "disk":
        return str(tmp_path / "store")
    return request.getfixturevalue("s3_bucket").url + "/store"


@pytest.fixture
def raypeft(home, capsys):
    """Runs a command line; gives its exit code, its output and its errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = run_guarded(app, arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
