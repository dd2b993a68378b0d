"""Runs: what is one and the same, who may write it, what is read of it, on a disk and on S3."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator import lease, objects
from orchestrator.errors import RunError, StorageError
from orchestrator.processes import is_alive, this_process
from orchestrator.runner import Spent
from orchestrator.spec.load import load_job_mapping
from orchestrator.store import RunStore

from .s3 import run_together


def job(**keys):
    """A small job; `training={...}` and the like override."""
    values = {
        "name": "small",
        "model": {"base_model": "base"},
        "data": {"datasets": [{"path": "rows.jsonl"}]},
        "training": {"num_epochs": 1, "learning_rate": 1e-3},
        **keys,
    }
    return load_job_mapping(values).spec


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    """An empty store on each kind of storage."""
    if request.param == "disk":
        return RunStore(tmp_path / "runs")
    return RunStore(request.getfixturevalue("s3_bucket").url + "/runs")


def test_a_new_run_is_stored_whole(store: RunStore) -> None:
    with store.open("small", job(), "data1") as run:
        assert run.id.startswith("small-") and len(run.id) == len("small-") + 8
        assert run.done is None
    record = store.get(run.id)
    assert (record.name, record.number, record.data_hash) == ("small", 1, "data1")
    assert record.created <= record.updated <= time.time()
    assert record.holder is None
    assert "learning_rate: 0.001" in objects.read(run.url + "/spec.yaml")[0].decode()
    assert json.loads(objects.read(run.url + "/run.json")[0])["format"] == 1


def test_the_same_again_is_the_same_run(store: RunStore) -> None:
    with store.open("small", job(), "data1") as first:
        first.set_state("starting")
        first.set_state("done", adapter="small@3", metrics={"eval_loss": 1.5})
    with store.open("small", job(), "data1") as second:
        assert second.id == first.id
        assert second.done == "small@3"
        assert second.record.metrics == {"eval_loss": 1.5}
    assert len(store.list()) == 1


def test_another_spec_under_the_name_is_refused_with_the_keys(store: RunStore) -> None:
    with store.open("small", job(), "data1") as run:
        pass
    other = job(training={"num_epochs": 1, "learning_rate": 2e-3})
    with pytest.raises(RunError) as caught:
        store.open("small", other, "data2")
    assert str(caught.value) == (
        f"the name 'small' has a run of another job, '{run.id}': training.learning_rate, the data's content "
        "differ. Start another run beside it: --new; with --resume it goes on once training.learning_rate, "
        "the data's content are as before."
    )
    with pytest.raises(RunError) as caught:
        store.open("small", other, "data1", resume=True)
    assert str(caught.value) == (
        f"run '{run.id}' cannot go on: training.learning_rate differs, which would make another adapter of "
        "it. May change: epochs and steps, resources, cadences, retry, deploy. Else start another run: --new."
    )
    with pytest.raises(RunError) as caught:
        store.open("small", job(training={"num_epochs": 2, "learning_rate": 1e-3}), "data1")
    assert str(caught.value) == (
        f"the name 'small' has a run of another job, '{run.id}': training.num_epochs differs. "
        "Start another run beside it: --new, or go on with it as it is now: --resume."
    )
    assert len(store.list()) == 1


def test_new_numbers_the_runs(store: RunStore) -> None:
    ids = []
    for rate in (1e-3, 2e-3, 2e-3):
        spec = job(training={"learning_rate": rate})
        with store.open("small", spec, "d", new=True) as run:
            ids.append(run.id)
    assert [id.rpartition("-")[0] for id in ids] == ["small", "small-2", "small-3"]
    with store.open("small", job(training={"learning_rate": 1e-3}), "d") as again:
        assert again.id == ids[0]
    with store.open("small", job(training={"learning_rate": 2e-3}), "d") as again:
        assert again.id == ids[2]  # the latest of the same job


def test_resume_takes_what_may_change(store: RunStore) -> None:
    with store.open("small", job(), "d") as run:
        run.set_state("starting")
        run.set_state("done", adapter="small@1")
        assert run.training_id == run.id
    longer = job(training={"num_epochs": 3, "learning_rate": 1e-3, "save_steps": 5})
    with store.open("small", longer, "d", resume=True) as run:
        assert run.id == store.list()[0].id
        assert run.done is None and run.record.adapter is None  # there is something left to train
        assert run.training_id != run.id
        run.set_state("training")
    assert "num_epochs: 3" in objects.read(run.url + "/spec.yaml")[0].decode()
    with store.open("small", longer, "d") as again:
        assert again.id == run.id and again.training_id == run.training_id


def test_resume_with_another_deployment_trains_nothing(store: RunStore) -> None:
    with store.open("small", job(), "d") as run:
        run.set_state("starting")
        run.set_state("done", adapter="small@1")
    with store.open("small", job(deploy={"alias": "staging"}), "d", resume=True) as run:
        assert run.record.adapter == "small@1" and run.record.state == "registered, not deployed"
        assert run.training_id == run.id


def test_resume_keeps_the_global_batch(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    two = job(training={"micro_batch_size": 4}, resources={"num_workers": 2})
    with store.open("small", two, "d") as run:
        pass
    with pytest.raises(RunError) as caught:
        store.open("small", job(training={"micro_batch_size": 4}), "d", resume=True)
    assert str(caught.value) == (
        f"run '{run.id}' cannot go on: its global batch is 8 rows, and would become 4. "
        "Set training.global_batch_size: 8, or start another run: --new."
    )
    one = job(training={"micro_batch_size": 4, "global_batch_size": 8})
    with store.open("small", one, "d", resume=True) as again:
        assert again.id == run.id


def test_states_events_and_facts(store: RunStore) -> None:
    with store.open("small", job(), "d") as run:
        event = run.set_state("starting", message="two workers")
        assert event["state"] == "starting" and event["message"] == "two workers"
        run.append_event({"event": "state", "t": 1.0, "state": "training"})
        assert run.record.state == "training"
        run.append_event({"event": "warning", "t": 2.0, "message": "careful"})
        run.append_event({"event": "state", "t": 2.5, "state": "done", "message": "said by the runner"})
        assert run.record.state == "training"  # only `set_state` ends a run
        run.set_state("failed", cause="worker 1 died", metrics={"loss": math.nan, "best": math.inf})
        record = store.get(run.id)
        assert record.state == "failed" and record.cause == "worker 1 died"
        assert math.isnan(record.metrics["loss"]) and record.metrics["best"] == math.inf
        json.dumps(record.to_dict(), allow_nan=False)
        run.set_state("starting", first_step_s=2.5)
        assert store.get(run.id).cause is None
        assert store.get(run.id).to_dict()["first_step_s"] == 2.5
        kinds = [(event["event"], event.get("state")) for event in run.events()]
    assert kinds == [
        ("state", "starting"), ("state", "training"), ("warning", None), ("state", "done"),
        ("state", "failed"), ("state", "starting"),
    ]  # fmt: skip
    assert [event["event"] for event in store.events(run.id)] == [kind for kind, _ in kinds]


def test_wrong_states_are_our_mistake(tmp_path: Path) -> None:
    with RunStore(tmp_path).open("small", job(), "d") as run:
        with pytest.raises(ValueError, match="'happy' is not a state of a run"):
            run.set_state("happy")
        run.set_state("starting")
        run.set_state("done", adapter="a@1")
        with pytest.raises(ValueError, match="a run that is done does not become training"):
            run.set_state("training")
        run.set_state("starting")  # where its version was deleted meanwhile
        assert run.record.adapter is None and run.done is None


def test_metrics_and_logs_are_kept_across_drivers(store: RunStore) -> None:
    with store.open("small", job(), "d") as run:
        run.append_metrics({"step": 1, "loss": 2.0})
        run.append_log(0, "hello\n")
        run.append_log(1, "other\n")
    with store.open("small", job(), "d") as run:
        run.append_metrics({"step": 2, "loss": math.nan})
        run.append_log(0, "again\n")
        assert run.metrics() == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": "NaN"}]
    assert list(store.log(run.id, 0)) == ["hello\n", "again\n"]
    assert store.workers(run.id) == (0, 1)
    assert [line["step"] for line in store.metrics(run.id)] == [1, 2]
    with pytest.raises(RunError) as caught:
        store.log(run.id, 7)
    assert str(caught.value) == f"run '{run.id}' has no log of worker 7. It has logs of: 0, 1."


def test_follow_ends_with_the_run(store: RunStore) -> None:
    run = store.open("small", job(), "d")
    run.set_state("starting")
    seen: list[dict] = []
    reader = threading.Thread(
        target=lambda: seen.extend(store.events(run.id, follow=True, poll_s=0.02)), daemon=True
    )
    reader.start()
    for number in range(5):
        run.append_event({"event": "warning", "t": 0.0, "message": str(number)})
    run.set_state("done", adapter="a@1")
    reader.join(timeout=20)
    assert not reader.is_alive()
    assert [event.get("message") for event in seen][1:6] == ["0", "1", "2", "3", "4"]
    assert seen[-1]["state"] == "done"
    run.close()


def test_at_its_end_a_run_has_said_everything(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sees the end finds the last event, metric and log line: they are written before it."""
    run = store.open("small", job(), "d")
    run.set_state("starting")
    run.append_log(0, "first\n")
    run.append_log(0, "last\n")
    run.append_metrics({"step": 1})
    run.append_metrics({"step": 2})
    seen = []
    real = objects.replace_if

    def looking(url, etag, data):
        if b'"state": "done"' in data:
            seen.append(
                (
                    list(store.events(run.id))[-1]["state"],
                    list(store.log(run.id, 0))[-1],
                    len(list(store.metrics(run.id))),
                )
            )
        return real(url, etag, data)

    with monkeypatch.context() as patched:
        patched.setattr(objects, "replace_if", looking)
        run.set_state("done", adapter="a@1")
    assert seen == [("done", "last\n", 2)]
    run.close()


def test_ids_by_name_prefix_and_closest(store: RunStore) -> None:
    with store.open("small", job(), "d") as run:
        pass
    with store.open("small", job(training={"max_steps": 9}), "d", new=True) as second:
        pass
    assert store.get("small").id == second.id
    assert store.get(run.id[:-2]).id == run.id
    with pytest.raises(RunError) as caught:
        store.get("smal")
    assert str(caught.value) == f"'smal' begins 2 runs: {run.id}, {second.id}. Write more of the id."
    with pytest.raises(RunError, match=r"there is no run 'snall' in .*runs\. Closest: small"):
        store.get("snall")
    with pytest.raises(RunError, match=r"there is no run 'zzz' in .*\. List them: raypeft jobs\."):
        store.get("zzz")
    with pytest.raises(RunError, match="there is no run"):
        store.get("../small")


def test_a_second_driver_is_refused_and_told_by_whom(store: RunStore) -> None:
    with store.open("small", job(), "d") as run:
        with pytest.raises(RunError) as caught:
            store.open("small", job(), "d")
        held = f"lease held by {this_process().host} pid {os.getpid()} since {time.strftime('%Y-')}"
        assert str(caught.value).startswith(f"run '{run.id}' has a driver already: {held}")
        assert re.search(r", until \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\. ", str(caught.value))
        assert str(caught.value).endswith(
            f"Follow it: raypeft logs {run.id} -f. Stop it: raypeft cancel {run.id}. If it is gone, the same "
            "command takes the run over once the lease has run out."
        )
        run.set_state("starting")  # the refusal took nothing away
    with store.open("small", job(), "d"):
        pass


HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from tests.orchestrator.test_store import job
from orchestrator.store import RunStore
run = RunStore(sys.argv[1]).open("small", job(), "d")
run.set_state("starting")
with run.on_the_clock():
    time.sleep(0.1)
    run.note_retry("worker lost")
    run.set_state("training")
    print(run.id, flush=True)
    time.sleep(60)
"""


def test_a_killed_driver_is_seen_and_taken_over(store: RunStore, repository: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(root=str(repository)), store.url],
        stdout=subprocess.PIPE,
        text=True,
    )
    id = child.stdout.readline().strip()
    record = store.get(id)
    assert record.state == "training" and record.holder.process.pid == child.pid
    with pytest.raises(RunError, match=f"lease held by .* pid {child.pid} since"):
        store.open("small", job(), "d")
    child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_alive(record.holder.process) and time.monotonic() < deadline:
        time.sleep(0.01)
    dead = store.get(id)  # a zombie still: its parent, this test, has not waited for it
    assert dead.state == "interrupted" and dead.has_ended
    assert dead.cause.startswith(f"its driver died: {record.holder.process.host} pid {child.pid} since ")
    assert list(store.events(id, follow=True))[-1]["state"] == "training"
    with store.open("small", job(), "d") as run:
        assert run.id == id
        # what it used up of `retry` is used up
        assert 0.1 <= run.record.spent.seconds < 60 and run.record.spent.retries == {"worker lost": 1}
        with run.on_the_clock():
            run.note_retry("worker lost")
        assert run.record.spent.seconds > dead.spent.seconds
        assert run.record.spent.retries == {"worker lost": 2}
    with store.open("small", job(), "d", resume=True) as run:
        assert run.record.spent == Spent()
    child.wait()
    child.stdout.close()


def test_the_one_before_can_write_no_more(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fence: a holder that seemed dead, and was only slow, finds that another has its run."""
    first = store.open("small", job(), "d")
    with monkeypatch.context() as patched:
        patched.setattr(lease.Holder, "is_dead", lambda self: True)
        second = store.open("small", job(), "d")
    with pytest.raises(RunError) as caught:
        first.set_state("starting")
    assert str(caught.value).startswith(
        f"run '{first.id}' was taken over by {this_process().host} pid {os.getpid()} since "
    )
    assert str(caught.value).endswith("This process stops writing it.")
    first.close()
    second.set_state("starting")
    assert store.get(first.id).state == "starting"
    second.close()


def test_a_holder_renews_its_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.02)
    store = RunStore(tmp_path)
    with store.open("small", job(), "d") as run:
        before = store.get(run.id).holder.renewed
        deadline = time.monotonic() + 10
        while store.get(run.id).holder.renewed <= before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert store.get(run.id).holder.renewed > before


def test_a_run_that_was_dropped_can_be_opened_again(tmp_path: Path) -> None:
    """As in a notebook, where a cell failed between `open` and `with`."""
    store = RunStore(tmp_path)
    run = store.open("small", job(), "d")
    id = run.id
    del run
    with store.open("small", job(), "d") as again:
        assert again.id == id


def test_leaving_by_an_exception_says_so(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with pytest.raises(ZeroDivisionError), store.open("small", job(), "d") as run:
        run.set_state("starting")
        raise ZeroDivisionError("by zero")
    assert (store.get("small").state, store.get("small").cause) == ("failed", "ZeroDivisionError: by zero")
    with pytest.raises(KeyboardInterrupt), store.open("small", job(), "d") as run:
        run.set_state("starting")
        raise KeyboardInterrupt
    assert store.get("small").state == "interrupted"
    with pytest.raises(RunError, match=r"is closed\. Open it again to write it."):
        run.append_metrics({})


def test_newer_and_damaged_runs_are_listed_as_such(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with store.open("small", job(), "d") as run:
        pass
    newer = tmp_path / "newer-12345678"
    newer.mkdir()
    (newer / "run.json").write_text('{"format": 2}')
    broken = tmp_path / "broken-12345678"
    broken.mkdir()
    (broken / "run.json").write_text('{"for')
    (tmp_path / "no-run").mkdir()
    (tmp_path / "mlflow.db").write_text("a tracker's")
    states = {record.id: (record.state, record.cause) for record in store.list()}
    assert set(states) == {run.id, newer.name, broken.name}
    assert states[newer.name] == (
        "unreadable",
        f"{newer}/run.json: a newer raypeft wrote this: format 2, and this one reads up to 1. "
        "Upgrade: pip install -U raypeft.",
    )
    assert "this file is damaged" in states[broken.name][1]
    with pytest.raises(StorageError, match="a newer raypeft wrote this"):
        store.get(newer.name)


def test_what_a_later_version_added_is_passed_over(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with store.open("small", job(), "d") as run:
        pass
    path = Path(run.url) / "run.json"
    document = json.loads(path.read_text()) | {"mood": "good"}
    document["spec"] += "bake: 10m\n"
    path.write_text(json.dumps(document))
    with store.open("small", job(), "d") as again:
        assert again.id == run.id
    with pytest.raises(RunError, match=r"training\.learning_rate differs"):
        store.open("small", job(training={"learning_rate": 5e-3}), "d")


def test_a_refused_store_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        RunStore(tmp_path / "deep" / "runs").open("small", job(), "d")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_a_run_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = objects.write

    def full(url, data):
        if str(url).endswith("spec.yaml"):
            raise StorageError("the disk is full.", where=str(url))
        real(url, data)

    monkeypatch.setattr(objects, "write", full)
    store = RunStore(tmp_path / "runs")
    with pytest.raises(StorageError, match="the disk is full"):
        store.open("small", job(), "d")
    assert list((tmp_path / "runs").iterdir()) == []
    monkeypatch.undo()
    with store.open("small", job(), "d") as run:
        run.set_state("starting")


@pytest.mark.parametrize("url", ["gs://bucket/runs", "memory://runs"])
def test_storage_that_cannot_keep_writers_apart_is_refused(url: str) -> None:
    with pytest.raises(StorageError) as caught:
        RunStore(url).open("small", job(), "d")
    assert str(caught.value) == (
        f"{url}: {url.partition(':')[0]}:// has no write here that fails if another process was first, so runs "
        "and registries cannot live there. Use a folder that all nodes see, or s3://BUCKET/FOLDER."
    )


RACE = """
import sys
sys.path.insert(0, {root!r})
from tests.orchestrator.test_store import job
from orchestrator import objects
from orchestrator.store import RunStore
from orchestrator.errors import RunError
store, wins, spec = RunStore(sys.argv[1]), 0, job()
count = sys.argv[1] + "-count"
for i in range(20):
    try:
        with store.open("small", spec, "d") as run:
            seen = int(objects.read(count)[0])
            run.append_metrics({{"i": i}})
            objects.write(count, str(seen + 1).encode())
            wins += 1
    except RunError as error:
        assert "lease held by" in str(error), error
print(wins)
"""


def test_two_drivers_never_write_one_run_together(store: RunStore, repository: Path) -> None:
    """Each counts up without a lock while it holds the run: were both in at once, a count would get lost."""
    objects.write(store.url + "-count", b"0")
    wins = [int(out) for out in run_together(RACE.format(root=str(repository)), [store.url], [store.url])]
    (record,) = store.list()
    assert record.holder is None
    assert len(list(store.metrics(record.id))) == sum(wins) == int(objects.read(store.url + "-count")[0])


def test_an_unfinished_line_is_ended_and_passed_over(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with store.open("small", job(), "d") as run:
        run.append_metrics({"step": 1})
    with open(Path(run.url) / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo')
    with store.open("small", job(), "d") as run:
        run.append_metrics({"step": 3})
        assert [line["step"] for line in run.metrics()] == [1, 3]


def test_long_journals_on_s3_are_read_as_one(s3_bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator import journal

    monkeypatch.setattr(journal, "_PART_BYTES", 100)
    writer = journal.Journal(s3_bucket.url + "/log")
    for number in range(50):
        writer.append(f"line {number}\n".encode())
    writer.close()
    assert list(journal.read_lines(s3_bucket.url + "/log")) == [f"line {number}" for number in range(50)]
    parts = [key for key in sorted(s3_bucket.keys()) if key.startswith("log.parts/")]
    assert len(parts) == 4 and parts == sorted(parts)
    again = journal.Journal(s3_bucket.url + "/log")
    again.append(b"more\n")
    again.close()
    assert list(journal.read_lines(s3_bucket.url + "/log"))[-1] == "more"
