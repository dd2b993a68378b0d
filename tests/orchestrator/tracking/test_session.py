"""Trackers are told from a thread, by a process of their own; none of them stops or slows a driver."""

import socket
import sqlite3
import subprocess
import sys
import time

import pytest

from orchestrator.tracking import session
from orchestrator.tracking.session import Tracking


def told(tracking: Tracking) -> None:
    with tracking:
        sweep = tracking.run("sweep-1", params={"sweep": {"metric": "eval_loss"}})
        trial = tracking.run("sweep-1-3", name="trial 3", parent=sweep, params={"adapter.r|x": 8})
        for step in (1, 2, 2, 1, 3):  # a failure repeats steps
            trial.metrics(step, {"loss": 1 / step, "learning_rate": 1e-3})
        trial.metrics(3, {"eval_loss": 0.5})
        trial.tags({"raypeft.version": "docs@1"})
        trial.text("job.yaml", "name: docs\n")
        trial.end()
        sweep.end("failed")


def rows(file, query):
    with sqlite3.connect(file) as db:
        return db.execute(query).fetchall()


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """MLflow's database after two drivers told the same runs, the second with a changed parameter."""
    folder = tmp_path_factory.mktemp("mlflow")
    target = {"kind": "mlflow", "uri": f"sqlite:///{folder}/m.db", "experiment": "docs",
              "artifacts": f"file://{folder}/files"}  # fmt: skip
    first = Tracking([target], ends_within_s=120)
    told(first)
    assert first.warnings() == []
    again = Tracking([target], ends_within_s=120)
    with again:
        trial = again.run("sweep-1-3", params={"adapter.r|x": 16})
        for step in (3, 4):
            trial.metrics(step, {"loss": 1 / step})
            trial.metrics(step, {"eval_loss": 1.5 / step})  # the first of them again
        trial.end()
    assert again.warnings() == []
    return folder / "m.db"


def test_runs_are_nested_and_end_as_they_ended(database):
    assert rows(database, "select name, status from runs order by name") == [
        ("sweep-1", "FAILED"), ("trial 3", "FINISHED"),
    ]  # fmt: skip
    parent = rows(database, "select run_uuid from runs where name = 'sweep-1'")
    assert rows(database, "select value from tags where key = 'mlflow.parentRunId'") == parent


def test_a_run_goes_on_under_its_key_and_repeats_no_step(database):
    steps = rows(database, "select step, value from metrics where key = 'loss' order by step")
    assert steps == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    evaluations = rows(database, "select step, value from metrics where key = 'eval_loss' order by step")
    assert evaluations == [(3, 0.5), (4, 0.375)]


def test_parameters_stay_and_what_a_resumed_job_changed_is_a_tag(database):
    assert ("adapter.r_x", "8") in rows(database, "select key, value from params")
    tags = dict(rows(database, "select key, value from tags where key like 'r%'"))
    assert tags["resumed.adapter.r_x"] == "16" and tags["raypeft.version"] == "docs@1"


def test_texts_lie_beside_the_database(database):
    (found,) = database.parent.glob("files/*/artifacts/job.yaml")
    assert found.read_text() == "name: docs\n"


def test_tensorboard_files_hold_what_was_told(tmp_path):
    told(Tracking([{"kind": "tensorboard", "folder": str(tmp_path)}], ends_within_s=60))
    (file,) = (tmp_path / "sweep-1" / "trial 3").glob("events.out.*")
    content = file.read_bytes()
    assert all(word in content for word in (b"loss", b"eval_loss", b"job_yaml", b"docs@1"))


def test_wandb_keeps_files_offline(tmp_path):
    pytest.importorskip(
        "wandb", reason='the extra raypeft[wandb] is not installed: pip install "raypeft[wandb]"'
    )
    target = {"kind": "wandb", "project": "p", "entity": None, "mode": "offline", "folder": str(tmp_path)}
    tracking = Tracking([target], ends_within_s=120)
    told(tracking)
    assert tracking.warnings() == []
    (run,) = tmp_path.glob("wandb/offline-run-*-sweep-1-3")
    content = (run / "run-sweep-1-3.wandb").read_bytes()
    assert b"eval_loss" in content and b"docs@1" in content
    assert (run / "files" / "job.yaml").read_text() == "name: docs\n"


def test_trials_of_a_long_name_have_ids_of_their_own():
    runs = pytest.importorskip(
        "orchestrator.tracking.wandb_runs",
        reason='the extra raypeft[wandb] is not installed: pip install "raypeft[wandb]"',
    )
    sweep = "a-sweep-of-sixty-letters-and-more-" + "x" * 40
    ids = {runs._id(f"{sweep}/trial-{number:03d}") for number in range(20)}
    assert len(ids) == 20 and all(len(each) == 64 for each in ids)
    assert runs._id("sweep-1/trial-003-ab") == "sweep-1-trial-003-ab"


def test_a_server_that_is_down_is_told_of_once_and_not_waited_for(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tracking = Tracking([{"kind": "mlflow", "uri": f"http://127.0.0.1:{port}", "experiment": "docs"}])
    run = tracking.run("docs-1")
    slowest, found, until = 0.0, [], time.monotonic() + 90
    while not found and time.monotonic() < until:
        began = time.perf_counter()
        run.metrics(1, {"loss": 1.0})
        slowest = max(slowest, time.perf_counter() - began)
        found += tracking.warnings()
        time.sleep(0.05)
    began = time.monotonic()
    tracking.close()
    assert time.monotonic() - began < 5
    assert len(found + tracking.warnings()) == 1 and found[0].startswith("tracking.mlflow: ")
    assert slowest < 2


def test_a_process_that_dies_is_told_of_once(monkeypatch):
    code = "import sys; sys.stdin.readline()"
    monkeypatch.setattr(session, "COMMAND", (sys.executable, "-c", code))
    tracking = Tracking([{"kind": "mlflow"}])
    run = tracking.run("docs-1")
    for step in range(100):
        run.metrics(step, {"loss": 1.0})
    tracking.close()
    assert tracking.warnings() == ["tracking: its process died, and nothing more is tracked."]


def test_what_nobody_takes_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(session, "COMMAND", (sys.executable, "-c", "import time; time.sleep(20)"))
    monkeypatch.setattr(session, "MOST_WAITING", 50)
    tracking = Tracking([{"kind": "mlflow"}], ends_within_s=1)
    run = tracking.run("docs-1", tags={"long": "x" * 100_000})
    began = time.monotonic()
    for step in range(2000):
        run.metrics(step, {"loss": 1.0})
    assert time.monotonic() - began < 5
    tracking.close()
    assert time.monotonic() - began < 10
    (said,) = tracking.warnings()
    assert said.endswith("messages were left out: the trackers are too slow.")
    tracking.kill()


def test_without_trackers_nothing_is_started():
    tracking = Tracking()
    told(tracking)
    assert tracking.warnings() == [] and tracking.process is None


def test_a_driver_that_is_killed_leaves_a_run_that_was_killed(database):
    code = (
        "import os, time\n"
        "from orchestrator.tracking.session import Tracking\n"
        f"target = {{'kind': 'mlflow', 'uri': 'sqlite:///{database}', 'experiment': 'docs'}}\n"
        "run = Tracking([target]).run('docs-9')\n"
        "run.metrics(1, {'loss': 1.0})\n"
        "time.sleep(1)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    until = time.monotonic() + 60
    while rows(database, "select status from runs where name = 'docs-9'") != [("KILLED",)]:
        assert time.monotonic() < until
        time.sleep(0.2)
    found = "select value from metrics where run_uuid in (select run_uuid from runs where name = 'docs-9')"
    assert rows(database, found) == [(1.0,)]


def test_a_server_that_never_answers_is_not_waited_for():
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        target = {"kind": "mlflow", "uri": f"http://127.0.0.1:{mute.getsockname()[1]}", "experiment": "docs"}
        tracking = Tracking([target])
        tracking.run("docs-1").end()
        began = time.monotonic()
        tracking.close()
        assert time.monotonic() - began < 10
        tracking.kill()
