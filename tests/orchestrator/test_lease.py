"""One writer per run: who is refused and when, who may take over, and that one who was overtaken commits nothing.

Time is the lease's own, a fraction of a second; clocks of other machines are set wrong on purpose.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import lease, objects, stored
from orchestrator.errors import LeaseError, StorageError
from orchestrator.registry import Registry
from orchestrator.store import Run, RunStore

from .adapters import lineage, make_adapter
from .faulty import FaultyStorage, dies_at
from .test_store import HOLD, job

TTL_S = 0.6
DAY_S = 86_400.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "TTL_S", TTL_S)
    monkeypatch.setattr(lease, "POLL_S", 0.02)
    monkeypatch.setattr(objects.again, "PAUSES_S", (0.0, 0.0, 0.0))


def opened(store: RunStore, **options) -> Run:
    return store.open("small", job(), "d", **options)


def held_elsewhere(run: Run, clock: float) -> None:
    """As if a driver on another host had the run, whose clock differs from ours by `clock` seconds."""
    url = run.url + "/run.json"
    document = stored.load(objects.read(url)[0], url)
    now = time.time() + clock
    document["holder"] = {
        "host": "far", "boot": "other", "pid": 7, "started": 1, "token": "theirs", "since": now - 60,
        "renewed": now, "beats": 3, "ttl_s": TTL_S,
    }  # fmt: skip
    document["fence"] += 1
    objects.write(url, stored.dump(document))


def renewing(run: Run, clock: float, every_s: float = TTL_S / 4) -> Callable[[], None]:
    """Has that other driver renew its lease until the returned function is called."""
    url, over = run.url + "/run.json", threading.Event()

    def beat(document) -> None:
        document["holder"] |= {"renewed": time.time() + clock, "beats": document["holder"]["beats"] + 1}

    def renew() -> None:
        while not over.wait(every_s):
            lease.change(url, "theirs", None, beat)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    return lambda: (over.set(), thread.join())


def left_behind(store: RunStore, clock: float) -> Run:
    run = opened(store)
    run.close()
    held_elsewhere(run, clock)
    return run


def test_a_driver_elsewhere_is_refused_at_once_and_told_until_when(place):
    store = RunStore(place)
    run = left_behind(store, 0.0)
    began = time.monotonic()
    with pytest.raises(LeaseError) as caught:
        opened(store)
    assert time.monotonic() - began < TTL_S + 5  # no watching; the rest is a slow machine's
    text = str(caught.value)
    assert text.startswith(f"run '{run.id}' has a driver already: lease held by far pid 7 since 20")
    assert ", until 20" in text and "takes the run over once the lease has run out" in text


@pytest.mark.parametrize("clock", [-DAY_S, -2 * TTL_S, 2 * TTL_S, DAY_S])
def test_a_wrong_clock_takes_no_run_from_a_driver_that_renews(tmp_path, clock):
    store = RunStore(tmp_path)
    stop = renewing(left_behind(store, clock), clock)
    try:
        with pytest.raises(LeaseError, match="lease held by far pid 7"):
            opened(store)
    finally:
        stop()


@pytest.mark.parametrize("clock", [-DAY_S, -2 * TTL_S, 0.0, 2 * TTL_S, DAY_S])
def test_a_driver_that_renews_no_more_is_taken_over_whatever_its_clock_says(tmp_path, clock):
    store = RunStore(tmp_path)
    run, said = left_behind(store, clock), []
    deadline = time.monotonic() + 20
    while True:  # at clock 0 it looks fresh until its time is over
        began = time.monotonic()
        try:
            again = opened(store, say=said.append)
            break
        except LeaseError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert time.monotonic() - began >= TTL_S  # watched for the whole of it, by our own clock
    assert (
        again.id == run.id and len(said) == 1 and "is watched for 0.6 s before this driver takes" in said[0]
    )
    again.set_state("starting")
    again.close()
    assert store.get(run.id).holder is None


def test_two_that_watch_do_not_both_take_it(place):
    store = RunStore(place)
    left_behind(store, -DAY_S)
    got: list[object] = []

    def attempt() -> None:
        try:
            got.append(opened(store))
        except LeaseError as error:
            got.append(error)

    both = [threading.Thread(target=attempt) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sorted(type(each).__name__ for each in got) == ["LeaseError", "Run"]
    next(each for each in got if isinstance(each, Run)).close()


def test_a_stopped_driver_of_this_host_is_overtaken_and_then_commits_nothing(tmp_path, repository):
    """SIGSTOP, as a machine that swaps or a paused container: alive, silent, and back after its time."""
    text = HOLD.format(root=str(repository)).replace(
        "time.sleep(60)",
        "time.sleep(1); sys.stdin.readline()\n"
        "try: run.set_state('evaluating')\n"
        "except Exception as error: print(type(error).__name__, flush=True)",
    )
    text = f"import sys; sys.path.insert(0, {str(repository)!r})\nfrom orchestrator import lease\n" + (
        f"lease.TTL_S, lease.RENEW_S = {TTL_S}, 0.1\n{text}"
    )
    store = RunStore(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", text, store.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        id = child.stdout.readline().strip()
        child.send_signal(signal.SIGSTOP)
        time.sleep(2 * TTL_S)
        with opened(store) as run:
            assert run.id == id
            run.set_state("training")
            child.send_signal(signal.SIGCONT)
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline().strip() == "LeaseError"
            assert run.record.state == "training" and store.get(id).state == "training"
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def overtaken(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Run]:
    """A run and a second hold on it that took it over, as after a silence."""
    first = opened(store)
    with monkeypatch.context() as patched:
        patched.setattr(lease.Holder, "is_dead", lambda self: True)
        second = opened(store)
    return first, second


def test_one_who_was_overtaken_commits_nothing(place, monkeypatch):
    store = RunStore(place)
    first, second = overtaken(store, monkeypatch)
    before = objects.read(second.url + "/run.json")[0]
    for commit in (
        lambda: first.set_state("starting"),
        lambda: first.append_event({"event": "checkpoint", "step": 9}),
        lambda: first.append_metrics({"step": 9}),
        lambda: first.append_log(0, "late"),
        lambda: first.fence.commit(lambda document: document.update(adapter="x@1")),
        first.fence.advanced,
        first.fence.check,
    ):
        with pytest.raises(LeaseError, match="was taken over by"):
            commit()
    first.close()
    assert objects.read(second.url + "/run.json")[0] == before
    assert second.events() == [] and second.metrics() == [] and store.workers(second.id) == ()
    second.fence.commit(lambda document: document.update(adapter="y@2"))
    assert store.get(second.id).adapter == "y@2"
    second.close()


def test_a_later_group_of_workers_makes_the_one_before_void(place):
    with opened(RunStore(place)) as run:
        one = run.fence.advanced()
        one.commit(lambda document: document["checkpoints"].update(a={"step": 1}))
        two = run.fence.advanced()
        assert (one.number, two.number) == (run.fence.number + 1, run.fence.number + 2)
        with pytest.raises(LeaseError, match="has a later group of workers: number 3, this is 2"):
            one.commit(lambda document: document["checkpoints"].clear())
        two.commit(lambda document: document["checkpoints"].update(b={"step": 2}))
        run.set_state("starting")  # the driver's own commits go on, and lose none of the workers'
        document = json.loads(objects.read(run.url + "/run.json")[0])
        assert set(document["checkpoints"]) == {"a", "b"} and document["state"] == "starting"


def test_many_commit_at_once_and_none_is_lost(place):
    with opened(RunStore(place)) as run:
        fence = run.fence

        def commit(name: str) -> None:
            for number in range(4):
                entry = {f"{name}{number}": {"step": 1}}
                fence.commit(lambda document, entry=entry: document["checkpoints"].update(entry))

        threads = [threading.Thread(target=commit, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(json.loads(objects.read(run.url + "/run.json")[0])["checkpoints"]) == 12


def test_a_driver_learns_that_it_was_overtaken(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    store, told = RunStore(tmp_path), threading.Event()
    first = opened(store)
    first.when_lost(told.set)
    held_elsewhere(first, 0.0)
    assert told.wait(20)
    with pytest.raises(LeaseError, match="was taken over by far pid 7"):
        first.check_held()
    first.close()


def test_a_storage_that_fails_for_a_while_loses_no_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.02)
    store = RunStore(tmp_path)
    run = opened(store)
    with FaultyStorage(1, lasting=True).installed() as faults:
        deadline = time.monotonic() + 20
        while faults.count < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert faults.count >= 3
    run.check_held()
    run.set_state("starting")
    run.close()


# registration


def register(registry: Registry, folder: Path, fence: int | None):
    return registry.register("a", folder, lineage(run_id="run-1"), train_rows=["x"], fence=fence)


def seen(registry: Registry) -> list[str]:
    return [version.ref for version in registry.versions("a")]


def test_a_run_registers_once_whoever_does_it(place, tmp_path):
    registry, folder = Registry(place), make_adapter(tmp_path / "adapter")
    first = register(registry, folder, 1)
    assert register(registry, folder, 2).ref == first.ref == "a@1"
    with pytest.raises(
        LeaseError, match=r"was taken over by another driver, which registers it: number 2, this is 1"
    ):
        register(registry, folder, 1)
    assert seen(registry) == ["a@1"]
    assert register(registry, folder, None).ref == "a@2"  # by hand: each call makes a version


def writes_of(act: Callable[[], object]) -> int:
    with FaultyStorage().installed() as faults:
        act()
    return faults.count


@pytest.mark.parametrize("done", [False, True], ids=["not done", "answer lost"])
def test_every_write_of_a_registration_may_fail(tmp_path, done):
    """For each n: what is there afterwards is whole, and the next attempt ends with one version of the run."""
    folder = make_adapter(tmp_path / "adapter")
    number = writes_of(lambda: register(Registry(tmp_path / "count"), folder, 1))
    assert number >= 4
    for nth in range(1, number + 1):
        registry = Registry(tmp_path / f"{done}-{nth}")
        with FaultyStorage(nth, done=done).installed(), pytest.raises(StorageError):
            register(registry, folder, 1)
        assert len(seen(registry)) <= 1
        version = register(registry, folder, 2)
        assert seen(registry) == [version.ref]
        registry.pull(version.ref, tmp_path / f"pulled-{done}-{nth}")  # every sum holds


def test_a_registration_may_die_at_every_write(tmp_path):
    folder, nth, died = make_adapter(tmp_path / "adapter"), 0, True
    while died:
        nth += 1
        registry = Registry(tmp_path / str(nth))
        died = dies_at(nth, lambda registry=registry: register(registry, folder, 1))
        version = register(registry, folder, 2)
        assert seen(registry) == [version.ref]
        registry.pull(version.ref, tmp_path / f"pulled-{nth}")
    assert nth > 10  # the walk has walked


def test_one_who_hangs_at_any_write_of_a_registration_registers_nothing_late(tmp_path):
    """Meanwhile another driver takes the run over and registers it: one version in the end, and it is that one,
    or the first one's where that was whole before."""
    folder = make_adapter(tmp_path / "adapter")
    number = writes_of(lambda: register(Registry(tmp_path / "count"), folder, 1))
    refused = 0
    for nth in range(1, number + 1):
        registry, theirs = Registry(tmp_path / str(nth)), []
        with FaultyStorage(
            nth, meanwhile=lambda r=registry, t=theirs: t.append(register(r, folder, 2).ref)
        ).installed():
            try:
                assert register(registry, folder, 1).ref == theirs[0]
            except LeaseError:
                refused += 1
        assert seen(registry) == theirs
    assert refused >= number - 1


def test_without_a_fence_the_one_who_hangs_registers_twice(tmp_path):
    """The control: it is the fence that keeps the second version away."""
    folder, registry = make_adapter(tmp_path / "adapter"), Registry(tmp_path / "registry")
    with FaultyStorage(2, meanwhile=lambda: register(registry, folder, None)).installed():
        register(registry, folder, None)
    assert len(seen(registry)) == 2
