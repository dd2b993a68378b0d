"""Runs on Ray: finished, killed, stopped, refused. One job, so that their final adapters can be compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from orchestrator.errors import DataError, Interrupted, OutOfTimeError, PlacementError, TrainingError
from orchestrator.keeper import descendants
from orchestrator.train.driver.launch import RayRunner
from orchestrator.train.worker.checkpoint import steps_in

from .ends import difference
from .tiny import job, plan, request

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

LONG = {"num_epochs": 40, "saves_per_epoch": 1, "eval_steps": 1000}
SECRET = "hunter2-planted"


@pytest.fixture(scope="module")
def session(local_ray) -> Iterator[None]:
    ray.init(address=local_ray.gcs_address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def leftovers() -> list[str]:
    """Placement groups and live actors of this driver that a run left behind."""
    groups = [
        entry["placement_group_id"]
        for entry in placement_group_table().values()
        if entry["state"] != "REMOVED"
    ]
    return [*groups, *map(str, train_workers())]


def train_workers(below: int | None = None) -> list[int]:
    """Processes of Ray Train workers of the session's Ray."""
    found = []
    for pid in descendants(below or KEEPER[0]):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "RayTrainWorker" in title:
            found.append(pid)
    return found


KEEPER: list[int] = []


@pytest.fixture(scope="module", autouse=True)
def keeper(local_ray) -> None:
    KEEPER[:] = [local_ray.keeper_pid]


def settled(deadline_s: float = 15) -> list[str]:
    end = time.monotonic() + deadline_s
    while (left := leftovers()) and time.monotonic() < end:
        time.sleep(0.2)
    return left


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uninterrupted(session, folder):
    runner = RayRunner()
    runner.start(
        request(folder, job(folder, training=LONG), plan(workers=2), run="whole", secrets={"PLANTED": SECRET})
    )
    events = list(runner.events())
    return events, runner.outcome()


def test_a_run_tells_its_story(uninterrupted, folder):
    events, outcome = uninterrupted
    steps = [event["step"] for event in events if event["event"] == "progress"]
    assert steps == list(range(1, 201))
    states = [event["state"] for event in events if event["event"] == "state"]
    assert states[0] == "starting" and states[-3:] == ["training", "evaluating", "saving"]
    assert "2 worker(s) on cpu over gloo, fp32" in [event.get("message") for event in events]
    assert outcome.steps == 200 and 0 < outcome.first_step_s < 600
    assert outcome.metrics["eval_loss"] < outcome.metrics["base.eval_loss"]
    assert len(Path(outcome.train_rows).read_text().split()) == 18
    assert len(Path(outcome.eval_rows).read_text().split()) == 5
    assert outcome.question == "0 + 1 = "
    assert {event["rank"] for event in events if event["event"] == "log"} <= {0, 1}
    assert SECRET not in str(events)
    assert settled() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_frozen_worker_changes_nothing(uninterrupted, folder, number, monkeypatch):
    monkeypatch.setattr("orchestrator.train.driver.trainer.FROZEN_S", 10.0)
    runner = RayRunner()
    runner.start(request(folder, job(folder, training=LONG), plan(workers=2), run=f"ended-{number.name}"))
    failures = []
    killed = False
    for event in runner.events():
        if event["event"] == "checkpoint" and not killed:
            os.kill(train_workers()[-1], number)
            killed = True
        if event["event"] == "failure":
            failures.append(event)
    assert killed and len(failures) == 1
    assert failures[0]["attempt"] == 1 and failures[0]["will_retry"] and failures[0]["kind"] == "worker lost"
    outcome = runner.outcome()
    assert outcome.steps == 200
    # the same sums in the same order on the same number of threads: equal but for what a restart could change
    assert difference(outcome, uninterrupted[1]) <= 1e-6
    assert settled() == []


def test_a_stopped_run_is_saved_and_goes_on(uninterrupted, folder):
    asked = request(folder, job(folder, training=LONG), plan(workers=2), run="stopped")
    runner = RayRunner()
    runner.start(asked)
    stopped_at = 0.0
    for event in runner.events():
        if event["event"] == "progress" and not stopped_at:
            stopped_at = time.monotonic()
            runner.stop()
    assert time.monotonic() - stopped_at < 30
    with pytest.raises(
        Interrupted, match=r"was stopped after \d+ step\(s\). The checkpoint of step \d+ is saved"
    ):
        runner.outcome()
    (saved,) = steps_in(asked.run_dir)
    assert 0 < saved < 200
    assert settled() == []

    again = RayRunner()
    again.start(asked)
    events = list(again.events())
    assert f"going on from the checkpoint at step {saved}" in [event.get("message") for event in events]
    assert difference(again.outcome(), uninterrupted[1]) <= 1e-6


def test_a_users_error_ends_the_run_at_once(session, folder):
    broken = folder / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n')
    spec = job(folder, data={"datasets": [{"path": str(broken), "type": "prompt_completion"}]})
    runner = RayRunner()
    runner.start(request(folder, spec, plan(workers=2), run="broken"))
    failures = [event for event in runner.events() if event["event"] == "failure"]
    with pytest.raises(DataError, match="completion"):
        runner.outcome()
    assert [event["will_retry"] for event in failures] == [False]
    assert settled() == []


def raise_beside_a_peer_that_waits() -> None:
    """Rank 1 raises while rank 0 is in a collective that it will never join."""
    import torch.distributed as dist
    from ray.train import get_context

    from orchestrator.train.worker.entry import join, rank_facts

    join(rank_facts())
    if get_context().get_world_rank() == 1:
        raise KeyError("planted")
    dist.barrier()


class Planted(RayRunner):
    """A runner whose workers run something else."""

    def _open_group(self, asked):
        group = super()._open_group(asked)
        group.train_loop_per_worker = raise_beside_a_peer_that_waits
        return group


def test_a_rank_that_raises_ends_the_run_though_its_peer_waits(session, folder):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    runner, began = Planted(), time.monotonic()
    try:
        runner.start(request(folder, job(folder), plan(workers=2), run="raised"))
        failures = [event for event in runner.events() if event["event"] == "failure"]
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    with pytest.raises(TrainingError, match=r"worker 1 failed with KeyError: 'planted'\. See raypeft logs\."):
        runner.outcome()
    assert [(each["kind"], each["rank"], each["will_retry"]) for each in failures] == [("error", 1, False)]
    # most of it is the workers' start; the collective alone would wait for ten minutes
    assert time.monotonic() - began < 120
    assert settled() == []


def test_a_run_out_of_time_is_saved_and_says_so(session, folder):
    asked = request(
        folder, job(folder, training=LONG, retry={"max_duration": "1h"}), plan(workers=2), run="out-of-time"
    )
    runner = RayRunner()
    runner.start(asked)
    for event in runner.events():
        if event["event"] == "progress" and event["step"] == 3:
            runner._attempts._began -= 3600
    with pytest.raises(OutOfTimeError) as ended:
        runner.outcome()
    (saved,) = steps_in(asked.run_dir)
    assert str(ended.value) == (
        f"run 'out-of-time' ended after {saved} step(s): retry.max_duration (1h) is over. The checkpoint of step "
        f"{saved} is saved; run it again with --resume to go on for 1h more."
    )
    assert settled() == []


def test_more_than_the_cluster_has_is_refused_at_once(session, folder):
    with pytest.raises(PlacementError) as refused:
        RayRunner().start(request(folder, job(folder), plan(workers=3), run="refused"))
    assert str(refused.value) == (
        "resources: 3 x {CPU: 1} placed PACK will never fit: the cluster has {CPU: 2} on 1 node(s), room for 2 "
        "worker(s). Lower resources.num_workers or what each worker asks for."
    )
    assert leftovers() == [] and not (folder / "refused").exists()


def test_a_busy_cluster_is_waited_for_and_said_so(session, folder):
    taken = placement_group([{"CPU": 2}])
    ray.get(taken.ready())
    try:
        runner = RayRunner()
        spec = job(folder, retry={"start_timeout": "3s"})
        runner.start(request(folder, spec, plan(workers=2), run="busy"))
        waiting = [event["message"] for event in runner.events() if event.get("state") == "waiting"]
        with pytest.raises(PlacementError, match=r"no room after 3 s of waiting for 2 x \{CPU: 1\}"):
            runner.outcome()
    finally:
        remove_placement_group(taken)
    assert len(waiting) == 1
    assert waiting[0].endswith("for 2 x {CPU: 1}; free now: CPU 0 of 2") and waiting[0].startswith(
        "waiting since "
    )
    assert settled() == []


FAKE_GPUS = """
import sys
from pathlib import Path
from orchestrator.local_ray import down, ensure_up
from orchestrator.train.driver.launch import RayRunner
from tests.orchestrator.train.tiny import job, plan, request
up = ensure_up(num_cpus=2, num_gpus=2, object_store_bytes=100_000_000)
try:
    runner = RayRunner(up.gcs_address)
    folder = Path(sys.argv[1])
    gpus = plan(workers=2, bundle={"CPU": 1.0, "GPU": 1.0})
    runner.start(request(folder, job(folder), gpus))
    for event in runner.events():
        if event["event"] == "state":
            print(event["message"])
    print("steps", runner.outcome().steps)
finally:
    down()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPUs of this machine are real")
def test_fake_gpus_train_on_the_cpu_over_gloo(tmp_path, repository):
    ran = subprocess.run(
        [sys.executable, "-c", FAKE_GPUS, tmp_path],
        env={**os.environ, "RAYPEFT_HOME": str(tmp_path / "home")},
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert "2 worker(s) on cpu over gloo, fp32" in ran.stdout, ran.stdout + ran.stderr
    assert ran.stdout.rstrip().endswith("steps 5")
