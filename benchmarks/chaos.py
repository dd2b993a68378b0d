"""What is lost when parts of a running job die: one job, again and again, each time with another fault.

    python benchmarks/chaos.py [--seeds 20] [--only worker node ...] [--write [--go-on]]

Runs a small job (two workers, the embedded base) on a Ray of several nodes on this machine, lets it come to a step
that the seed draws, and then, a moment later that it draws too, does the fault; four in one run, each once the run has
stepped on after the one before:

    worker, node, driver, head       SIGKILL: to a worker; to all of a node with one; to the driver; to Ray's head
    sigterm-worker, sigterm-driver   SIGTERM, as before a machine goes: a checkpoint is due, and nothing is lost
    truncated, flipped               the driver is killed, and the newest checkpoint damaged before the next one
    storage, full, slow              in one process, for every n: its nth write fails; all from the nth on fail, and
                                     the command is given again once there is room; each takes a fifth of a second

A fault of the driver or the head is followed, as by whoever watches over it, by the same command once more. A line
says where the run stood, how many steps it repeats, how many it may (those since the last checkpoint that was told,
or since the one before where that one is damaged), how long it took to step again, and whether the adapter and its
losses are those of an undisturbed run. Exits with 1 where a run lost more, ended differently or did not end.

What happens is said as it happens, with the seconds since the start. With --write each run is kept as soon as it is
over; --go-on leaves out what this day's table has already, and was good, so that one that was ended goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

import ray  # noqa: E402
from ray.cluster_utils import Cluster as RayCluster  # noqa: E402

from orchestrator import keeper, objects  # noqa: E402
from orchestrator.cluster import ClusterFacts, NodeFacts, cluster_at  # noqa: E402
from orchestrator.errors import RaypeftError  # noqa: E402
from orchestrator.registry import Registry  # noqa: E402
from orchestrator.runner import TrainOutcome, TrainRequest  # noqa: E402
from orchestrator.service import Environment, StopRequest, run_job  # noqa: E402
from orchestrator.spec.load import load_job_mapping  # noqa: E402
from orchestrator.store import RunStore  # noqa: E402
from orchestrator.train.driver.launch import RayRunner  # noqa: E402
from orchestrator.train.worker.checkpoint import OPTIMIZER_FILE  # noqa: E402
from peft_dist.lazy import lazy  # noqa: E402
from tests.orchestrator.faulty import FaultyStorage  # noqa: E402

# they import torch, which the drivers' processes can do without
tensors, running = lazy("safetensors.torch"), lazy("orchestrator.train.worker.run")

STORAGES = ("storage", "full", "slow")
KILLS = ("worker", "node", "driver", "head")
DAMAGES = ("truncated", "flipped")
OTHERS = ("sigterm-worker", "sigterm-driver", *DAMAGES)
SAVE_STEPS, HERE_STEPS, ROWS = 4, 10, 60
IN_ONE_RUN, MOST_GAP = 4, 20
"""Faults in one run, and the most steps from one to the next."""
LIMIT_S = 600.0
"""A run that takes no step for so long counts as hanging."""
LEAVE_S = 60.0
"""A driver that lost its head leaves by itself within this, or is killed."""


def job(folder: Path, steps: int) -> dict[str, Any]:
    """The job on rows in `folder`, few enough that reading them takes no time."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        lines = (ROOT / "jobs/assets/python-docs.jsonl").read_text().splitlines()[:ROWS]
        rows.write_text("\n".join(lines) + "\n")
    return {
        "name": "chaos",
        "model": {"base_model": str(ROOT / "jobs/assets/tiny-llama")},
        "data": {
            "datasets": [{"path": str(rows), "type": "chat"}],
            "val_set_size": 8,
            "sequence_len": 128,
        },
        "adapter": {"type": "lora", "r": 8},
        "training": {
            "num_epochs": steps, "max_steps": steps, "micro_batch_size": 2, "learning_rate": 1e-3,
            "save_steps": SAVE_STEPS, "eval_steps": 1000,
        },
        "resources": {"num_workers": 2},
        "storage": {"keep_latest": 3},
        "retry": {"worker_failure": 100},
    }  # fmt: skip


# the driver, in a process of its own


def drive(folder: Path, address: str, steps: int) -> int:
    """`raypeft run` of the job on the Ray at `address`: prints its events as JSON, and at last a result or an error."""
    stop = StopRequest()
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray has set its own
        signal.signal(number, lambda *_: stop.ask())
    environment = Environment(
        cluster=cluster_at("http://127.0.0.1:1"),
        runs=RunStore(folder / "runs"),
        registry=Registry(folder / "registry"),
        open_runner=lambda: RayRunner(address),
        open_endpoints=lambda: None,  # type: ignore[arg-type,return-value]
        facts=lambda: ClusterFacts((NodeFacts(3, memory=8 << 30),), 3, 0, source="chaos"),
    )

    def show(event: dict[str, Any]) -> None:
        print(json.dumps(event, default=str), flush=True)

    try:
        result = run_job(load_job_mapping(job(folder, steps)).spec, environment, on_event=show, stop=stop)
    except RaypeftError as error:
        show({"event": "error", "message": str(error)})
        return error.exit_code
    show({"event": "result", **result.to_dict()})
    return 0


class Driver:
    """A driver's process, and what it says, with the time at which it was heard."""

    def __init__(self, folder: Path, address: str, steps: int) -> None:
        command = [sys.executable, __file__, "--drive", str(folder), address, "--steps", str(steps)]
        with open(folder / "driver.err", "ab") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=folder)
        self.said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                self.said.put(json.loads(line))
        self.said.put(None)

    def kill(self) -> None:
        """SIGKILL, and waits."""
        self.process.kill()
        self.process.wait()


# Ray, several nodes on this machine


class Machines:
    """A head without CPUs and three nodes with one each: two workers, and a node to spare."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.ray = RayCluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False},
        )
        self.fill()

    @property
    def address(self) -> str:
        """Of the head."""
        return self.ray.address

    def fill(self) -> None:
        """Nodes that are missing join."""
        while len(self.ray.worker_nodes) < 3:
            self.ray.add_node(num_cpus=1, object_store_memory=80 << 20)

    def workers(self) -> list[tuple[Any, int]]:
        """Node and process of each worker of a run."""
        found = []
        for node in self.ray.worker_nodes:
            raylet = node.all_processes["raylet"][0].process.pid
            found += [(node, pid) for pid in keeper.descendants(raylet) if _is_worker(pid)]
        return found

    def lose_node(self, node: Any) -> None:
        """SIGKILL to a node's raylet and to all that it started."""
        below = [pid for each in node.all_processes["raylet"] for pid in keeper.descendants(each.process.pid)]
        self.ray.remove_node(node, allow_graceful=False)
        keeper.send(signal.SIGKILL, below)

    def lose_head(self) -> None:
        """SIGKILL to the head's processes."""
        self.ray.head_node.kill_all_processes(check_alive=False, allow_graceful=False)

    def again(self) -> None:
        """A new cluster in the place of one without a head."""
        self.end()
        self._start()

    def end(self) -> None:
        """Takes everything down."""
        for node in [*self.ray.worker_nodes, self.ray.head_node]:
            with contextlib.suppress(Exception):  # what is left of it goes below
                node.kill_all_processes(check_alive=False, allow_graceful=False)
        keeper.end(lambda: [pid for pid in keeper.descendants(os.getpid()) if _is_rays(pid)])


def _is_worker(pid: int) -> bool:
    return b"RayTrainWorker" in _command(pid)


def _is_rays(pid: int) -> bool:
    return any(name in _command(pid) for name in (b"ray::", b"raylet", b"gcs_server", b"/ray/"))


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# one trial


@dataclass
class Outcome:
    """A line of the table."""

    seed: int
    fault: str
    at_step: int = 0
    resumed_at: int | None = None
    steps_lost: int | None = None
    may_lose: int = 0
    again_s: float | None = None
    """Seconds from the fault to the next step."""
    left_s: float | None = None
    """Of a driver that was told to go: seconds until its process was gone."""
    difference: float | None = None
    """Largest difference of a weight from the undisturbed run's adapter."""
    loss_difference: float | None = None
    wall_s: float = 0.0
    tried: int = 1
    """How many runs this line stands for: the worst of them."""
    problem: str = ""

    @property
    def is_good(self) -> bool:
        """Whether it lost no more than it may and ended as if nothing had been."""
        return not self.problem

    def __str__(self) -> str:
        lost = "-" if self.steps_lost is None else str(self.steps_lost)
        again = "-" if self.again_s is None else f"{self.again_s:.1f}"
        equal = {None: "-", 0.0: "bit for bit"}.get(self.difference, f"to {self.difference}")
        return (
            f"{self.seed:>4} {self.fault:<15} {self.tried:>5} {self.at_step:>7} {lost:>6} {self.may_lose:>8} "
            f"{again:>9} {equal:<12} {self.problem or 'good'}"
        )


_BEGAN = time.monotonic()


def say(text: str) -> None:
    """A line on how far it is."""
    print(f"[{time.monotonic() - _BEGAN:6.0f} s] {text}", flush=True)


HEADER = "seed fault           tried at step   lost may lose  again, s equal"


class Trial:
    """One run with its faults, one after the other: each once it has stepped on after the one before."""

    def __init__(
        self, machines: Machines, folder: Path, steps: int, faults: Sequence[tuple[int, str]]
    ) -> None:
        self.machines, self.folder, self.steps = machines, folder, steps
        self.waiting, self.outcomes = list(faults), list[Outcome]()
        self.step, self.saved, self.kept = 0, 0, 0
        self.struck_at: float | None = None
        self.result: dict[str, Any] | None = None
        self.error = "it said nothing"
        self._arm()

    def run(self) -> dict[str, Any]:
        """To the end, through the faults; returns what the driver said at last.

        Raises:
            TimeoutError: it hangs, or no driver comes to the end.
        """
        self.deadline = time.monotonic() + LIMIT_S
        for _ in range(2 + len(self.waiting) + 1):
            self._follow(Driver(self.folder, self.machines.address, self.steps))
            if self.result is not None:
                return self.result
        raise TimeoutError(f"no driver came to the end: {self.error}")

    def _arm(self) -> None:
        """The next fault."""
        self.outcome: Outcome | None = None
        self.struck_at, self.armed_at = None, time.monotonic()
        if not self.waiting:
            return
        seed, fault = self.waiting.pop(0)
        self.outcome = Outcome(seed, fault)
        self.outcomes.append(self.outcome)
        self.draw = random.Random(f"{seed} {fault}")
        self.strike_at = self.step + self.draw.randint(
            2 * SAVE_STEPS + 1 if fault in DAMAGES else 1, MOST_GAP
        )
        self.delay_s = self.draw.uniform(0, 0.5)

    def _follow(self, driver: Driver) -> None:
        try:
            while True:
                left = self.deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("it hangs")
                try:
                    event = driver.said.get(timeout=min(left, 1.0))
                except queue.Empty:
                    continue
                if event is None:
                    if self.outcome is not None and self.outcome.fault == "sigterm-driver" and self.struck_at:
                        self.outcome.left_s = round(time.time() - self.struck_at, 1)
                        say(f"the driver has left after {self.outcome.left_s} s: {self.error}")
                    return
                self._hear(event)
                if self.outcome is not None and self.struck_at is None and self.step >= self.strike_at:
                    time.sleep(self.delay_s)
                    while not driver.said.empty():
                        self._hear(driver.said.get() or {})
                    if self.result is None:
                        self._strike(driver, self.outcome)
        finally:
            if driver.process.poll() is None and self.result is not None:
                driver.process.wait(60)
            driver.kill()

    def _hear(self, event: dict[str, Any]) -> None:
        kind, outcome = event.get("event"), self.outcome
        if kind == "progress":
            self.step, self.deadline = event["step"], time.monotonic() + LIMIT_S
            if outcome is not None and outcome.resumed_at is not None and self.struck_at is not None:
                outcome.again_s = round(event["t"] - self.struck_at, 1)
                outcome.wall_s = round(time.monotonic() - self.armed_at, 1)
                say(
                    f"seed {outcome.seed} {outcome.fault}: steps again after {outcome.again_s} s, step {self.step}"
                )
                self._arm()
        elif kind == "checkpoint":
            self.saved = event["step"]
        elif kind == "state" and event["state"] == "training" and self.struck_at is not None:
            self._resumed(int(event["message"].split()[3]))  # training from step N to M
        elif kind == "result":
            self.result = event
        elif kind == "error":
            self.error = event["message"]

    def _resumed(self, at: int) -> None:
        """The workers begin again. What was heard since the fault had happened before it took effect."""
        outcome = self.outcome
        if outcome is None or outcome.resumed_at is not None:
            return
        outcome.resumed_at, outcome.at_step = at, self.step
        outcome.steps_lost = max(0, self.step - at)  # it may have gone on unheard
        if outcome.fault.startswith("sigterm"):
            outcome.may_lose = 0
        elif outcome.fault in DAMAGES:
            outcome.may_lose = self.step - self.kept
        else:
            outcome.may_lose = self.step - self.saved

    def _strike(self, driver: Driver, outcome: Outcome) -> None:
        fault, outcome.at_step = outcome.fault, self.step
        self.struck_at = time.time()
        say(f"seed {outcome.seed} {fault}: at step {self.step}, the last checkpoint is of step {self.saved}")
        if fault in ("worker", "sigterm-worker"):
            number = signal.SIGKILL if fault == "worker" else signal.SIGTERM
            os.kill(self.draw.choice(self.machines.workers())[1], number)
        elif fault == "node":
            self.machines.lose_node(self.draw.choice(self.machines.workers())[0])
            self.machines.fill()
        elif fault == "driver":
            driver.kill()
        elif fault == "sigterm-driver":
            driver.process.terminate()
        elif fault == "head":
            self.machines.lose_head()
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.process.wait(LEAVE_S)
            driver.kill()
            self.machines.again()
        else:
            driver.kill()
            self._damage(fault)

    def _damage(self, fault: str) -> None:
        (run,) = (self.folder / "runs").iterdir()
        found = {
            int(path.name.split(".")[0].removeprefix("step-")): path
            for path in (run / "checkpoints").glob("step-*")
        }
        newest, *before = sorted(found, reverse=True)
        file = found[newest] / OPTIMIZER_FILE
        data = bytearray(file.read_bytes())
        if fault == "truncated":
            del data[len(data) // 2 :]
        else:
            data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        file.write_bytes(data)
        self.kept = before[0] if before else 0


# storage, in this process


class HereRunner:
    """Trains in the calling process, with one worker."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []
        self.stop_requested = False

    def start(self, request: TrainRequest) -> None:
        """Keeps the request; `events` trains."""
        self.request = request

    def emit(self, kind: str, **fields: Any) -> None:
        """As `events.Reporter`."""
        self.said.append({"event": kind, **fields})

    def events(self) -> Iterator[dict[str, Any]]:
        """Trains, then tells."""
        self.error: RaypeftError | None = None
        try:
            self.end = running.train(self.request, reporter=self)
        except RaypeftError as error:
            self.error = error
        yield from self.said

    def stop(self) -> None:
        """It is over when it could be asked."""

    def outcome(self) -> TrainOutcome:
        """What it came to."""
        if self.error is not None:
            raise self.error
        end = self.end
        files = (end.train_rows, end.eval_rows)
        return TrainOutcome(end.adapter_dir, end.metrics, end.steps, 0.0, *files, question=end.question)

    def steps(self) -> list[int]:
        """Those that were taken."""
        return [event["step"] for event in self.said if event["event"] == "progress"]


def run_here(folder: Path, faults: FaultyStorage) -> tuple[HereRunner, dict[str, Any] | RaypeftError]:
    """One command, over storage with faults: its runner, and its result or error."""
    asked = job(folder, HERE_STEPS)
    asked["resources"] = {"num_workers": 1}
    runner = HereRunner()
    environment = Environment(
        cluster=cluster_at("http://127.0.0.1:1"),
        runs=RunStore(folder / "runs"),
        registry=Registry(folder / "registry"),
        open_runner=lambda: runner,  # type: ignore[arg-type,return-value]
        open_endpoints=lambda: None,  # type: ignore[arg-type,return-value]
        facts=lambda: ClusterFacts((NodeFacts(1, memory=8 << 30),), 1, 0, source="chaos"),
    )
    try:
        with faults.installed():
            return runner, run_job(load_job_mapping(asked).spec, environment).to_dict()
    except RaypeftError as error:
        return runner, error


def storage_trial(fault: str) -> Outcome:
    """Runs with their storage failing at each of its writes in turn, or slow; the worst of them."""
    objects.again.PAUSES_S = (0.0, 0.0, 0.0)
    outcome, began = Outcome(0, fault, difference=0.0, tried=0), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        (Path(scratch) / "whole").mkdir()
        counted = FaultyStorage()
        _, expected = run_here(Path(scratch) / "whole", counted)
        assert isinstance(expected, dict), expected
        theirs = weights(Path(scratch) / "whole", expected)
        turns = [None] if fault == "slow" else list(range(1, counted.count + 1))
        for nth in turns:
            folder = Path(scratch) / f"{nth}"
            folder.mkdir()
            faults = FaultyStorage(nth, lasting=fault == "full", delay_s=0.2 if fault == "slow" else 0.0)
            first, result = run_here(folder, faults)
            if not isinstance(result, dict):  # the same command, now that the storage is well
                again, result = run_here(folder, FaultyStorage())
                saved = [event["step"] for event in first.said if event["event"] == "checkpoint"]
                at = max(first.steps(), default=0)
                lost = at - (min(again.steps()) - 1) if again.steps() else 0
                if (outcome.steps_lost or 0) <= lost:
                    outcome.at_step, outcome.steps_lost = at, lost
                    outcome.may_lose = at - max(saved, default=0)
                if lost > at - max(saved, default=0):
                    outcome.problem = f"LOST {lost} steps at write {nth}: {faults.log[-1]}"
            outcome.tried += 1
            if not isinstance(result, dict):
                outcome.problem = f"write {nth}, {faults.log[nth or 0]}: {result}"
                continue
            ours = weights(folder, result)
            difference = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
            outcome.difference = max(outcome.difference or 0.0, difference)
            versions = [version.ref for version in Registry(folder / "registry").versions("chaos")]
            if difference or versions != [result["adapter"]]:
                outcome.problem = f"ENDED DIFFERENTLY at write {nth}: {versions}, {difference:.1e}"
            shutil.rmtree(folder)
    outcome.wall_s = round(time.monotonic() - began, 1)
    return outcome


def weights(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The registered adapter's tensors."""
    version = Registry(folder / "registry").get(result["adapter"])
    return tensors.load_file(Path(version.url) / "adapter_model.safetensors")


def undisturbed(machines: Machines, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result and the weights of a run to which nothing happens."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        result = Trial(machines, Path(folder), steps, ()).run()
        return result, weights(Path(folder), result)


def trial(
    machines: Machines,
    steps: int,
    faults: Sequence[tuple[int, str]],
    whole: tuple[dict[str, Any], dict[str, Any]],
) -> list[Outcome]:
    """One run with these faults: a line for each."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    machines.fill()
    one = Trial(machines, folder, steps, faults)
    try:
        result = one.run()
        ours = weights(folder, result)
    except Exception as error:  # whatever it is: one run's end is not that of the others
        if not one.outcomes:
            raise
        one.outcomes[-1].problem = f"{type(error).__name__}: {error}"
        for _, fault in one.waiting:
            say(f"not tried any more in this run: {fault}")
        print(f"kept to look at: {folder}")
        return one.outcomes
    expected, theirs = whole
    for outcome in one.outcomes:
        outcome.difference = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
        outcome.loss_difference = abs(result["metrics"]["eval_loss"] - expected["metrics"]["eval_loss"])
        if outcome.steps_lost is None:
            outcome.problem = "the run was over first"
        elif outcome.steps_lost > outcome.may_lose:
            outcome.problem = f"LOST {outcome.steps_lost} steps"
        elif outcome.difference > 1e-5 or outcome.loss_difference > 1e-5:
            outcome.problem = f"ENDED DIFFERENTLY by {outcome.difference:.1e}"
    if all(outcome.is_good for outcome in one.outcomes):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"kept to look at: {folder}")
    return one.outcomes


def main() -> int:
    """Does what is asked for and prints the table; 1 where a run lost more than it may."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, help="how many runs have something killed")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--only", nargs="+", choices=[*STORAGES, *KILLS, *OTHERS], metavar="FAULT", help="all by default"
    )
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    parser.add_argument("--go-on", action="store_true", help="with --write: what this day's table lacks")
    parser.add_argument("--drive", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        return drive(Path(arguments.drive[0]), arguments.drive[1], arguments.steps)
    done = good_before() if arguments.write and arguments.go_on else set()
    kills = [fault for fault in KILLS if fault in (arguments.only or KILLS)]
    rest = [fault for fault in OTHERS if fault in (arguments.only or OTHERS)]
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    todo = [(seed, kills[seed % len(kills)]) for seed in seeds] if kills else []
    todo += [(arguments.first + number, fault) for number, fault in enumerate(rest)]
    todo = [(seed, fault) for seed, fault in todo if (fault, seed) not in done]
    outcomes = []
    for fault in STORAGES:
        if fault in (arguments.only or STORAGES) and (fault, 0) not in done:
            say(f"{fault}: runs in this process, one for each of their writes")
            outcomes.append(storage_trial(fault))
            print(HEADER, outcomes[-1], sep="\n", flush=True)
            if arguments.write:
                write(outcomes)
    if todo:
        outcomes = strike(todo, arguments, outcomes)
    bad = [outcome for outcome in outcomes if not outcome.is_good]
    print(f"{len(outcomes) - len(bad)} of {len(outcomes)} good")
    return int(bool(bad))


def strike(
    todo: list[tuple[int, str]], arguments: argparse.Namespace, before: list[Outcome]
) -> list[Outcome]:
    """The runs on Ray, line by line."""
    machines, outcomes = Machines(), list(before)
    try:
        steps, began = MOST_GAP * (IN_ONE_RUN + 1), time.monotonic()
        whole = undisturbed(machines, steps)
        loss = whole[0]["metrics"]["eval_loss"]
        print(
            f"undisturbed, {steps} steps: {time.monotonic() - began:.0f} s, eval_loss {loss:.6f}", flush=True
        )
        runs = [todo[first : first + IN_ONE_RUN] for first in range(0, len(todo), IN_ONE_RUN)]
        for number, faults in enumerate(runs, 1):
            drawn = ", ".join(f"{seed} {fault}" for seed, fault in faults)
            say(f"run {number} of {len(runs)}: {drawn}")
            found = trial(machines, steps, faults, whole)
            print(HEADER, *found, sep="\n", flush=True)
            outcomes += found
            if not all(outcome.is_good for outcome in found):
                machines.again()  # what it left behind is nobody's
            if arguments.write:
                write(outcomes)
    finally:
        machines.end()
    return outcomes


def _table() -> tuple[Path, list[dict[str, Any]]]:
    """Where this day's results are, and what they are until now."""
    date, hardware = time.strftime("%Y-%m-%d"), f"{os.cpu_count()}cpu-{platform.machine()}"
    result = ROOT / "benchmarks/results" / f"{date}-{hardware}-chaos.json"
    return result, json.loads(result.read_text())["trials"] if result.exists() else []


def good_before() -> set[tuple[str, int]]:
    """Fault and seed of what this day's table has, and was good."""
    return {(each["fault"], each["seed"]) for each in _table()[1] if each["good"]}


def write(outcomes: list[Outcome]) -> None:
    """Keeps the table as far as it is, beside what this day's other runs have tried."""
    result, trials = _table()
    kept = {(each["fault"], each["seed"]): each for each in trials}
    kept |= {(each.fault, each.seed): {**asdict(each), "good": each.is_good} for each in outcomes}
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{os.cpu_count()}cpu-{platform.machine()}",
        "ray": ray.__version__,
        "save_steps": SAVE_STEPS,
        "trials": list(kept.values()),
    }
    result.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
