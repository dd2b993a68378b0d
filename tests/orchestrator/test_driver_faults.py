"""A driver whose run is taken from it, or whose storage fails while it follows its workers."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator

import pytest

from orchestrator import journal, lease, objects
from orchestrator.errors import Interrupted, LeaseError, StorageError
from orchestrator.runner import Event
from orchestrator.store import RunStore

from .faulty import DyingOs, FaultyStorage
from .test_service import _until, house, job
from .test_store import job as small_job

__all__ = ["house"]


def take(url: str) -> None:
    """Another driver, elsewhere, takes the run at `url` over."""
    document = json.loads(objects.read(url + "/run.json")[0])
    document["fence"] += 10
    document["holder"] |= {"token": "theirs", "host": "far", "boot": "other", "pid": 7}
    objects.write(url + "/run.json", json.dumps(document).encode())


def test_a_driver_that_lost_its_run_stops_its_workers_and_says_why(house, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    house.runner.waits = True
    real = house.runner.events

    def events() -> Iterator[Event]:
        take(house.environment.runs.get("docs").url)
        yield from real()  # quiet until it is stopped: the renewal alone can find out

    house.runner.events = events
    with pytest.raises(LeaseError, match=r"run 'docs-.*' was taken over by far pid 7 since"):
        house.run(job())
    assert house.runner.stopped.is_set()
    record = house.environment.runs.get("docs")
    assert record.holder.process.host == "far" and record.state != "failed"
    assert house.environment.registry.names() == []


def test_a_driver_that_is_overtaken_while_it_registers_registers_nothing(house):
    """It hangs at each write in turn, from the end of training on, and finds another in its place."""
    with FaultyStorage().installed() as counted:
        house.run(job(deploy=None))
    first = next(i for i, entry in enumerate(counted.log) if "rows.txt" in entry)
    last = max(i for i, entry in enumerate(counted.log) if entry.startswith("put_tree"))
    for number, nth in enumerate(range(first + 3, last + 1), 2):
        name = f"docs{number}"

        def meanwhile(name=name):
            record = house.environment.runs.get(name)
            take(record.url)
            if record.state == "registering":
                house.environment.registry.claim(name, record.training_id, 99)

        with FaultyStorage(nth, meanwhile=meanwhile).installed(), pytest.raises(LeaseError):
            house.run(job(name=name, deploy=None))
        assert house.environment.registry.versions(name) == []


def test_a_driver_goes_on_over_a_storage_that_fails_for_a_while(house):
    """Events that cannot be kept now are kept later, and said so once."""
    real, ready = house.runner.events, threading.Event()

    def broken() -> None:
        raise OSError(28, "No space left on device")

    dying = DyingOs(None, broken)

    def events() -> Iterator[Event]:
        yield from real()
        for step in (2, 3):
            dying.nth = dying.count + 1  # the next write of a journal
            yield {
                "event": "progress", "step": step, "total_steps": 3, "epoch": 0, "loss": 3.0, "learning_rate": 1e-3,
                "grad_norm": 1.0, "tokens_per_s": 10.0, "eta_s": 1.0,
            }  # fmt: skip
        ready.set()

    house.runner.events = events
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal, "os", dying)
        result = house.run(job(deploy=None))
    assert result.state == "done" and ready.is_set()
    assert [line["step"] for line in house.environment.runs.metrics("docs")] == [1, 2, 3]
    said = [event["message"] for event in house.events if event["event"] == "warning"]
    assert len(said) == 1 and said[0].startswith("events cannot be stored now, and wait: ")
    assert "the disk is full" in said[0]


def test_a_second_command_is_refused_while_the_first_trains(house):
    house.runner.waits = True

    def train() -> None:
        with contextlib.suppress(Interrupted):
            house.run(job(deploy=None))

    first = threading.Thread(target=train, daemon=True)
    first.start()
    _until(lambda: house.environment.runs.list() and house.runner.requests)
    with pytest.raises(LeaseError, match=r"has a driver already: lease held by .* since .*, until "):
        house.run(job(deploy=None))
    house.runner.stopped.set()
    first.join(20)


def test_a_run_is_let_go_of_though_its_last_lines_cannot_be_written(tmp_path):
    store = RunStore(tmp_path)
    run = store.open("small", small_job(), "d")
    run.append_metrics({"step": 1})

    def broken() -> None:
        raise OSError(28, "No space left on device")

    dying = DyingOs(1, broken)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal, "os", dying)
        with pytest.raises(StorageError, match="the disk is full"):
            run.append_metrics({"step": 2})
        dying.nth = dying.count + 1
        with pytest.raises(StorageError, match="the disk is full"):
            run.close()
    with store.open("small", small_job(), "d") as again:
        assert again.id == run.id
