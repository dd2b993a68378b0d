"""From the command to the end of the first optimizer step: `raypeft run` beside a plain hand-written script.

    python benchmarks/startup.py [--rounds 3]

Both start from nothing (no Ray up), with the embedded base and data, two workers, ZeRO-2, in turn, in one run
of this file. Writes benchmarks/results/DATE-HARDWARE-startup.json and fails above the bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
BASE, DATA = ROOT / "jobs/assets/tiny-llama", ROOT / "jobs/assets/python-docs.jsonl"
BOUND = 1.15
JOB = f"""
name: startup
model: {{base_model: {BASE}}}
data: {{datasets: [{{path: {DATA}, type: chat}}], val_set_size: 0.1, sequence_len: 512}}
adapter: {{type: lora, r: 8}}
training: {{max_steps: 1, micro_batch_size: 8, learning_rate: 1e-3}}
deepspeed: zero2
resources: {{num_workers: 2}}
"""


def plain_s() -> float:
    """Seconds of the hand-written script."""
    with _scratch() as (folder, environment):
        done = folder / "done"
        command = [sys.executable, str(ROOT / "benchmarks/plain_trainer.py"), str(BASE), str(DATA), str(done)]
        began = time.monotonic()
        with _process(command, environment) as process:
            while not done.exists():
                if process.poll() not in (None, 0):
                    raise SystemExit("the plain script failed")
                time.sleep(0.02)
            took = time.monotonic() - began
            process.wait(60)
        return took


def ours_s() -> float:
    """Seconds of `raypeft run`."""
    with _scratch() as (folder, environment):
        job = folder / "job.yaml"
        job.write_text(JOB)
        command = [sys.executable, "-m", "orchestrator", "run", str(job), "--json"]
        began = time.monotonic()
        took = None
        try:
            with _process(command, environment) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if took is None and json.loads(line).get("event") == "progress":
                        took = time.monotonic() - began
        finally:
            down = [sys.executable, "-m", "orchestrator", "down"]
            subprocess.run(down, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        if took is None:
            raise SystemExit("raypeft run failed")
        return took


@contextlib.contextmanager
def _scratch() -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder and an environment in which nothing is up and nothing is remembered but compiled bytecode."""
    with tempfile.TemporaryDirectory(prefix="st-") as name:
        own = {
            "RAYPEFT_HOME": f"{name}/home",
            "RAY_TMPDIR": name,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": f"{name}/hf",
        }
        yield Path(name), {**os.environ, **own, "RAY_USAGE_STATS_ENABLED": "0"}


@contextlib.contextmanager
def _process(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with open(Path(environment["RAY_TMPDIR"]) / "stderr", "w") as errors:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        except BaseException:
            print((Path(environment["RAY_TMPDIR"]) / "stderr").read_text()[-3000:], file=sys.stderr)
            raise
        finally:
            process.stdout.close()  # type: ignore[union-attr]
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def main() -> int:
    """Measures both in turn; 1 where ours takes more than BOUND times as long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    plain, ours = [], []
    for number in range(rounds):
        plain.append(plain_s())
        ours.append(ours_s())
        print(f"round {number + 1}: plain {plain[-1]:.1f} s, raypeft {ours[-1]:.1f} s", flush=True)
    ratio = statistics.median(ours) / statistics.median(plain)
    hardware = f"{os.cpu_count()}cpu-{platform.machine()}"
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware,
        "plain_s": plain,
        "raypeft_s": ours,
        "ratio_of_medians": round(ratio, 3),
        "bound": BOUND,
    }
    result = ROOT / "benchmarks/results" / f"{found['date']}-{hardware}-startup.json"
    result.write_text(json.dumps(found, indent=1) + "\n")
    print(f"ratio of the medians {ratio:.2f}, bound {BOUND}; written to {result.relative_to(ROOT)}")
    return int(ratio > BOUND)


if __name__ == "__main__":
    sys.exit(main())
