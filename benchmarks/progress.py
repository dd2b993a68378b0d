"""What showing progress costs: `raypeft run --json` beside `raypeft run --quiet`, the same short job.

    python benchmarks/progress.py [--pairs 5] [--steps 200]

Both run in turn on one local Ray, in one run of this file; which goes first alternates. Prints the ratio of the
medians of their wall times and fails above the bound.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BASE, DATA = ROOT / "jobs/assets/tiny-llama", ROOT / "jobs/assets/python-docs.jsonl"
BOUND = 1.02
JOB = f"""
name: progress
model: {{base_model: {BASE}}}
data: {{datasets: [{{path: {DATA}, type: chat}}], val_set_size: 0}}
training: {{micro_batch_size: 2, learning_rate: 1e-3}}
resources: {{num_workers: 1}}
"""


def raypeft(environment: dict[str, str], *arguments: str) -> float:
    """Seconds that a command takes; its output goes through a pipe and is thrown away."""
    began = time.monotonic()
    command = [sys.executable, "-m", "orchestrator", *arguments]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return time.monotonic() - began


def measure(pairs: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each run, by its flag."""
    took: dict[str, list[float]] = {"--json": [], "--quiet": []}
    with tempfile.TemporaryDirectory(prefix="pr-") as folder:
        job = Path(folder) / "job.yaml"
        job.write_text(JOB)
        environment = {**os.environ, "RAYPEFT_HOME": f"{folder}/home", "HF_HUB_OFFLINE": "1"}
        train = ("run", str(job), "--new", "--set", f"training.max_steps={steps}")
        try:
            raypeft(environment, "up")
            raypeft(environment, *train, "--quiet")  # the first run on a new Ray is slower than the others
            for number in range(pairs):
                for flag in sorted(took, reverse=number % 2 == 1):
                    took[flag].append(raypeft(environment, *train, flag))
                print("  ".join(f"{flag} {each[-1]:.2f} s" for flag, each in took.items()), flush=True)
        finally:
            raypeft(environment, "down")
    return took


def main() -> int:
    """1 where the view costs more than the bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    took = measure(given.pairs, given.steps)
    shown, quiet = (statistics.median(took[flag]) for flag in ("--json", "--quiet"))
    print(f"medians {shown:.2f} s and {quiet:.2f} s: ratio {shown / quiet:.3f}, bound {BOUND}")
    return int(shown / quiet > BOUND)


if __name__ == "__main__":
    sys.exit(main())
