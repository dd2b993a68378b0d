"""An elastic run on a Ray of two nodes on this machine: one of them is killed, and later returns.

    python benchmarks/elastic.py [--rounds 1] [--write]

A job of `num_workers: [1, 2]` (the embedded base, eight rows a step) runs through the command line. Once it steps with
two workers, every process of one node is killed with SIGKILL, its worker's too; once it steps again, the node is
started anew. A line says how long it took to step again and to grow, how many steps were repeated and how many could
be, and the largest difference between the losses of a step that was taken with two workers and again with one.
Exits with 1 where a bound is broken: 45 s to step again, 60 s to grow, more steps repeated than since the last
checkpoint, growth without a checkpoint, or losses that differ by more than fp32 sums in another order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", RAY_USAGE_STATS_ENABLED="0")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

from ray._common.utils import get_default_ray_temp_dir  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from orchestrator.keeper import descendants  # noqa: E402

SHRINK_S, GROW_S = 45.0, 60.0
SAVE_STEPS = 5
SETTLED_STEPS = 8
"""Steps that a group takes before the next thing happens to it."""
DEADLINE_S = 600.0
STORE = 100_000_000

JOB = f"""
name: elastic
model: {{base_model: {ROOT}/jobs/assets/tiny-llama}}
data: {{datasets: [{{path: {ROOT}/jobs/assets/python-docs.jsonl, type: chat}}], val_set_size: 0.1, sequence_len: 256}}
adapter: {{type: lora, r: 8}}
training: {{num_epochs: 1000, micro_batch_size: 4, global_batch_size: 8, learning_rate: 1e-4, save_steps: {SAVE_STEPS},
  eval_steps: 100000}}
deepspeed: zero2
resources: {{num_workers: [1, 2]}}
storage: {{keep_latest: 2}}
"""


def main() -> int:
    """Runs all rounds; 1 where one breaks a bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep the result under benchmarks/results/")
    parser.add_argument("--slack", type=float, default=1.0, help="by which the two times may be exceeded")
    options = parser.parse_args()
    rounds = []
    for number in range(options.rounds):
        rounds.append(one_round())
        print(f"round {number + 1}: {sentence(rounds[-1])}", flush=True)
    broken = [problem for found in rounds for problem in problems(found, options.slack)]
    for problem in broken:
        print(problem)
    if options.write:
        write(rounds)
    return int(bool(broken))


def sentence(found: dict[str, Any]) -> str:
    """A round in one line."""
    return (
        f"stepping again {found['shrink_s']:.1f} s after the node was killed, {found['repeated']} step(s) repeated of "
        f"{found['at_risk']} since the checkpoint, losses within {found['loss_difference']:.1e}; grown "
        f"{found['grow_s']:.1f} s after it returned, from the checkpoint of step {found['grown_from']}"
    )


def problems(found: dict[str, Any], slack: float) -> Iterator[str]:
    """What in a round is not as promised."""
    if found["shrink_s"] > SHRINK_S * slack:
        yield f"stepping again took {found['shrink_s']:.1f} s, the bound is {SHRINK_S:g} s"
    if found["grow_s"] > GROW_S * slack:
        yield f"growing took {found['grow_s']:.1f} s, the bound is {GROW_S:g} s"
    if found["repeated"] > found["at_risk"]:
        yield f"{found['repeated']} steps were repeated, {found['at_risk']} since the last checkpoint"
    if not found["saved_before_growth"]:
        yield "the run grew without a checkpoint of its last step"
    if found["loss_difference"] > 1e-4:
        yield f"a step's losses differ by {found['loss_difference']:.1e} with another number of workers"


def one_round() -> dict[str, Any]:
    """Kills a node under a run and brings it back."""
    with tempfile.TemporaryDirectory(prefix="el-") as name:
        cluster = start_cluster(name)
        try:
            return follow(Path(name), cluster, cluster.add_node(num_cpus=1, object_store_memory=STORE))
        finally:
            cluster.shutdown()


def start_cluster(folder: str) -> Cluster:
    """A head with one CPU on a random port."""
    Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)  # Ray writes the head's address there
    head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False, "temp_dir": folder}
    return Cluster(initialize_head=True, head_node_args=head)


class Round:
    """What has happened so far in one round, and what is done next."""

    def __init__(self, cluster: Cluster, node: Any, driver: subprocess.Popen[str]) -> None:
        self.cluster, self.node, self.driver = cluster, node, driver
        self.phase, self.since = "two", time.monotonic()
        self.taken = self.last = self.saved = 0
        self.losses: dict[int, float] = {}
        self.found: dict[str, Any] = {"loss_difference": 0.0}

    def hear(self, event: dict[str, Any]) -> None:
        """Takes in one event of the run."""
        kind, message = event["event"], event.get("message", "")
        if kind == "checkpoint":
            self.saved = event["step"]
        elif kind == "failure":
            self.found["cause"], self.phase = event["cause"], "lost"
        elif message.startswith("going on with 2 workers instead of 1"):
            self.phase = "growing"
        elif kind == "progress":
            self.step(event["step"], event["loss"])

    def step(self, step: int, loss: float) -> None:
        """A step was taken; a phase ends with the first one of the next group, or when it has had enough of them."""
        took, self.taken = time.monotonic() - self.since, self.taken + 1
        if self.phase == "lost":
            self.found |= {
                "shrink_s": took,
                "repeated": self.last - step + 1,
                "at_risk": self.last - self.saved,
            }
            self.enter("one")
        elif self.phase == "growing":
            self.found |= {"grow_s": took, "grown_from": step - 1}
            self.found["saved_before_growth"] = self.saved == self.last == step - 1
            self.enter("grown")
        if self.phase == "one" and step in self.losses:
            difference = abs(loss - self.losses[step]) / self.losses[step]
            self.found["loss_difference"] = max(self.found["loss_difference"], difference)
        self.losses[step], self.last = loss, step
        if self.taken < SETTLED_STEPS:
            return
        if self.phase == "two" and step % SAVE_STEPS == SAVE_STEPS - 1:
            kill(self.node)
            self.enter("killed")
        elif self.phase == "one":
            self.node = self.cluster.add_node(num_cpus=1, object_store_memory=STORE)
            self.enter("returned")
        elif self.phase == "grown":
            self.driver.send_signal(signal.SIGINT)
            self.enter("stopping")

    def enter(self, phase: str) -> None:
        """The next phase begins."""
        self.phase, self.since, self.taken = phase, time.monotonic(), 0


def kill(node: Any) -> None:
    """Ends every process of a node at once, as a machine that loses its power."""
    roots = [info.process.pid for infos in node.all_processes.values() for info in infos]
    for pid in {*roots, *(below for root in roots for below in descendants(root))}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def follow(folder: Path, cluster: Cluster, node: Any) -> dict[str, Any]:
    """Runs the job through the command line, does to its node what a round does, and stops it."""
    (folder / "job.yaml").write_text(JOB)
    where = f"storage: {folder}/runs\nregistry: {folder}/adapters\n"
    (folder / "cluster.yaml").write_text(f"kind: address\naddress: auto\n{where}")
    line = ["run", str(folder / "job.yaml"), "--cluster", str(folder / "cluster.yaml"), "--json"]
    environment = {
        **os.environ,
        "RAY_ADDRESS": cluster.address,
        "RAYPEFT_HOME": f"{folder}/home",
    }
    with open(folder / "stderr", "w") as errors:
        driver = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *line],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert driver.stdout is not None
        late = threading.Timer(DEADLINE_S, driver.kill)
        late.start()
        try:
            this = Round(cluster, node, driver)
            for text in driver.stdout:
                event = json.loads(text)
                if "event" in event:
                    this.hear(event)
            driver.wait()
        finally:
            late.cancel()
            driver.kill()
            driver.wait()
    if this.phase != "stopping":
        raise SystemExit(f"the run ended while '{this.phase}': {(folder / 'stderr').read_text()[-2000:]}")
    return this.found


def write(rounds: list[dict[str, Any]]) -> None:
    """Keeps the result, with its date and hardware."""
    hardware = f"{os.cpu_count()}cpu-{platform.machine()}"
    found = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware, "rounds": rounds}
    path = ROOT / "benchmarks/results" / f"{found['date']}-{hardware}-elastic.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
