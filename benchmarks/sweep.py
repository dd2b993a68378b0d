"""A sweep's makespan: `raypeft run` beside a hand-written script of Ray Tune, Ray Train, DeepSpeed and HF PEFT.

    python benchmarks/sweep.py [--trials 8 32] [--steps 20] [--lone 3] [--write]

Both start from nothing (no Ray up), one after the other, and train the same number of LoRA trials for the same steps of
eight rows of the embedded data on the embedded base, on two cores; what counts is the time from the command to its end.
Ours may take a fifth of the script's for 8 trials, a tenth for 32. `--lone` trials are then run as jobs of their own:
their evaluation losses are those of the sweep to 1e-3. With `--write` the figures are kept under benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE, DATA = ROOT / "jobs/assets/tiny-llama", ROOT / "jobs/assets/python-docs.jsonl"
BOUNDS = {8: 1 / 5, 32: 1 / 10}
CLOSE = 1e-3
ROWS = 600

JOB = """
name: {name}
model: {{base_model: {base}}}
data: {{datasets: [{{path: {data}, type: chat}}], val_set_size: 32, sequence_len: 128}}
adapter: {{type: lora, r: 8}}
training: {{max_steps: {steps}, micro_batch_size: 8, learning_rate: 1e-3}}
tracking: {{mlflow: false}}
"""


def rates(trials: int) -> list[float]:
    """The learning rates that both sweeps try."""
    return [10 ** (-4 + 2 * number / (trials - 1)) for number in range(trials)]


def plain(folder: Path, trials: int, steps: int) -> tuple[float, list[float]]:
    """Seconds of the hand-written sweep, and its losses."""
    done = folder / "plain" / "done"
    done.parent.mkdir()
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "benchmarks/plain_sweep.py"), str(BASE), str(folder / "rows.jsonl")]
    _run([*command, str(trials), str(steps), str(done)], folder)
    return time.monotonic() - began, json.loads(done.read_text())


def ours(folder: Path, trials: int, steps: int) -> tuple[float, dict[str, Any]]:
    """Seconds of `raypeft run`, and what the sweep came to."""
    job = folder / "sweep.yaml"
    job.write_text(
        JOB.format(name="sweep", base=BASE, data=folder / "rows.jsonl", steps=steps)
        + f"sweep:\n  searcher: grid\n  max_concurrent: {min(trials, 16)}\n"
        + f"  space: {{training.learning_rate: {{choice: {rates(trials)}}}}}\n"
    )
    began = time.monotonic()
    _run([sys.executable, "-m", "orchestrator", "run", str(job), "--quiet"], folder)
    took = time.monotonic() - began
    shown = _run([sys.executable, "-m", "orchestrator", "sweep", "show", "sweep", "--json"], folder)
    return took, json.loads(shown)


def lone(folder: Path, steps: int, rate: float) -> float:
    """The evaluation loss of one trial as a job of its own."""
    job = folder / "lone.yaml"
    job.write_text(JOB.format(name="lone", base=BASE, data=folder / "rows.jsonl", steps=steps))
    command = [sys.executable, "-m", "orchestrator", "run", str(job), "--json", "--new"]
    said = _run([*command, "--set", f"training.learning_rate={rate!r}"], folder)
    return json.loads(said.splitlines()[-1])["metrics"]["eval_loss"]


def measure(trials: int, steps: int, num_lone: int) -> dict[str, Any]:
    """One sweep on both sides, and some of its trials alone."""
    with tempfile.TemporaryDirectory(prefix="rps-") as name:
        folder = Path(name)
        with DATA.open() as rows, (folder / "rows.jsonl").open("w") as some:
            some.writelines(line for number, line in enumerate(rows) if number < ROWS)
        plain_s, _ = plain(folder, trials, steps)
        ours_s, shown = ours(folder, trials, steps)
        losses = {
            each["parameters"]["training.learning_rate"]: each["metrics"]["eval_loss"]
            for each in shown["trials"]
        }
        chosen = rates(trials)[:: max(1, trials // max(1, num_lone))][:num_lone]
        apart = [abs(lone(folder, steps, rate) - losses[rate]) for rate in chosen]
        _run([sys.executable, "-m", "orchestrator", "down"], folder)
    return {
        "trials": trials,
        "steps": steps,
        "plain_s": round(plain_s, 1),
        "ours_s": round(ours_s, 1),
        "share": round(ours_s / plain_s, 3),
        "bound": BOUNDS.get(trials),
        "lone_differences": apart,
    }


def _run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "RAYPEFT_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command[-4:])} failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}")
    return ended.stdout


def main() -> None:
    """Measures, prints, keeps; ends with 1 where a bound is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, nargs="+", default=[8])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lone", type=int, default=3, help="trials that are run alone too")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    results, missed = [], []
    for trials in asked.trials:
        found = measure(trials, asked.steps, asked.lone)
        results.append(found)
        print(
            f"{trials} trials: by hand {found['plain_s']} s, ours {found['ours_s']} s ({found['share']:.2f}); "
            f"lone runs differ by at most {max(found['lone_differences'], default=0):.1e}",
            flush=True,
        )
        if found["bound"] is not None and found["share"] > found["bound"]:
            missed.append(
                f"{trials} trials take {found['share']:.2f} of the script's time, above {found['bound']}"
            )
        if max(found["lone_differences"], default=0) > CLOSE:
            missed.append(f"of {trials} trials, one ends elsewhere than alone")
    if asked.write:
        hardware = f"{os.cpu_count()}cpu-{platform.machine()}"
        path = ROOT / f"benchmarks/results/{datetime.date.today()}-{hardware}-sweep.json"
        path.write_text(json.dumps({"load": os.getloadavg(), "results": results}, indent=1) + "\n")
    for line in missed:
        print(f"missed: {line}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
