"""The plan's memory against a worker's: one shape here, more in benchmarks/memory_plan.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_estimate_is_within_a_fifth_of_the_measured_peak():
    """20 %: what the plan promises for LoRA in fp32. Slow: builds a base of 20M parameters and trains on it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "memory_plan.py"), "--only", "20M"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    ratios = [float(line.split()[-3]) for line in done.stdout.splitlines()[1:]]
    assert len(ratios) == 2 and all(0.8 < ratio < 1.2 for ratio in ratios), done.stdout
