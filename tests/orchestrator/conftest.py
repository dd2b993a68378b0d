"""Fixtures of the orchestrator's tests that need no Ray."""

import pytest

from orchestrator.cli import app, run_guarded

from .s3 import s3_bucket, s3_endpoint

__all__ = ["raypeft", "s3_bucket", "s3_endpoint"]


@pytest.fixture
def raypeft(home, capsys):
    """Runs a command line; gives its exit code, its output and its errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = run_guarded(app, arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
