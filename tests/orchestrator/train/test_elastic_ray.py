"""An elastic run loses a node to SIGKILL and gets it back, through the command line, on a Ray of two nodes."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_run_goes_on_without_its_node_and_grows_when_it_returns(repository):
    """No step is lost but those since the last checkpoint, none at all by growing, and losses are the same with another
    number of workers. The benchmark's two times hold on a machine that does nothing else; here four times as long."""
    command = [sys.executable, str(repository / "benchmarks" / "elastic.py"), "--slack", "4"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert "round 1: stepping again" in ran.stdout and "from the checkpoint of step" in ran.stdout
