"""What rows that share sequences save: processor seconds of an optimizer step, beside the same rows apart.

    python benchmarks/sample_packing.py [--steps 6]

The quickstart's base, rows and adapter in one process on one thread, 64 rows a step, with and without dropout of the
adapter. Each way takes the same steps; their losses are held beside each other. Writes
benchmarks/results/DATE-HARDWARE-sample_packing.json and fails where a loss differs by more than 1e-5, or where packing
costs more than it saves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from orchestrator.plan import make_plan
from orchestrator.runner import TrainRequest
from orchestrator.spec.load import load_job
from orchestrator.train.worker import loop
from orchestrator.train.worker.run import train

ROOT = Path(__file__).parent.parent
ROWS, LENGTH = 64, 256
WAYS = {
    "apart, 8 a forward": (False, 8),
    "apart, 64 a forward": (False, 64),
    "shared, 4 a forward": (True, 4),
}


class Told:
    """Hears the losses."""

    stop_requested = False

    def __init__(self) -> None:
        self.losses: list[float] = []

    def emit(self, kind: str, /, **fields: Any) -> None:
        if kind == "progress":
            self.losses.append(fields["loss"])


def run(folder: Path, shares: bool, micro: int, dropout: float, steps: int) -> dict[str, Any]:
    """Seconds of a step, its median, and the losses."""
    job = load_job(
        ROOT / "jobs/quickstart.yaml",
        [f"training.max_steps={steps}", f"training.micro_batch_size={micro}", "data.val_set_size=0", "deploy=null",
         f"training.gradient_accumulation_steps={ROWS // micro}", "resources.num_workers=1",
         f"data.sample_packing={json.dumps(shares)}", f"data.sequence_len={LENGTH}", f"adapter.lora_dropout={dropout}"],
    )  # fmt: skip
    seconds: list[float] = []
    step = loop.Training.take_step

    def timed(self: Any, batch: Any) -> Any:
        began = time.process_time()
        outcome = step(self, batch)
        seconds.append(time.process_time() - began)
        return outcome

    told = Told()
    loop.Training.take_step = timed  # type: ignore[method-assign]
    try:
        name = f"{shares}-{micro}-{dropout}"
        request = TrainRequest(job.spec, make_plan(job.spec, None, None), str(folder / name), name, "0" * 8)
        train(request, reporter=told)  # type: ignore[arg-type]
    finally:
        loop.Training.take_step = step  # type: ignore[method-assign]
    return {"step_s": round(statistics.median(seconds), 3), "losses": told.losses}


def main() -> None:
    """Runs every way in turn and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    steps = parser.parse_args().steps
    os.chdir(ROOT)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dropout in (0.0, 0.1):
            for way, (shares, micro) in WAYS.items():
                found[f"{way}, dropout {dropout}"] = run(Path(folder), shares, micro, dropout, steps)
    failed = []
    for dropout in (0.0, 0.1):
        apart, shared = (
            found[f"{way}, dropout {dropout}"] for way in ("apart, 8 a forward", "shared, 4 a forward")
        )
        difference = max(abs(a - b) for a, b in zip(apart["losses"], shared["losses"], strict=True))
        shared["largest_difference"], shared["times_faster"] = difference, apart["step_s"] / shared["step_s"]
        print(
            f"dropout {dropout}: {shared['times_faster']:.2f} times the speed, losses differ by {difference:.1e}"
        )
        if difference > 1e-5 or shared["times_faster"] < 1:
            failed.append(dropout)
    hardware = f"{os.cpu_count()}cpu-{platform.machine()}"
    out = ROOT / "benchmarks/results" / f"{date.today()}-{hardware}-sample_packing.json"
    result = {
        "rows": ROWS,
        "sequence_len": LENGTH,
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "ways": found,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
