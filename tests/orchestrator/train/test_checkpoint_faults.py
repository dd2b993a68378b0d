"""A checkpoint under faults: storage that fails, dies, hangs or is slow at each of its writes, writers that were
overtaken. What was committed stays, and nothing else is ever found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator import lease, objects
from orchestrator.errors import LeaseError, StorageError
from orchestrator.store import Run, RunStore
from orchestrator.train.worker.checkpoint import (
    OPTIMIZER_FILE,
    Position,
    damage_of,
    local_copy,
    newest_good,
    prune,
    step_url,
    steps_in,
    write_checkpoint,
)
from orchestrator.train.worker.run import train

from ..faulty import FaultyStorage, dies_at
from ..test_store import job as small_job
from .ends import adapter_of
from .test_checkpoint import FAULTS, STATE, save_adapter
from .test_run import Recorder, same
from .tiny import job, request


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects.again, "PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture(params=["disk", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path):
    """A held run on each kind of storage."""
    place = str(tmp_path / "runs")
    if request.param == "s3":
        place = request.getfixturevalue("s3_bucket").url + "/runs"
    with RunStore(place).open("small", small_job(), "d") as run:
        yield run


def write(run: Run, step: int, fence: lease.Fence | None = None, loss: float | None = None) -> str:
    metrics = {} if loss is None else {"eval_loss": loss}
    position = Position(step=step, epoch=1, seed=7, metrics=metrics)
    return write_checkpoint(run.url, position, save_adapter, STATE, fence or run.fence)


def save(run: Run, step: int, fence: lease.Fence | None = None) -> None:
    """As the loop does."""
    write(run, step, fence)
    prune(run.url, 1, 1, fence or run.fence)


def newest(run: Run, scratch: Path) -> int | None:
    found = newest_good(run.url, scratch)
    if found is None:
        return None
    assert damage_of(found.path) is None and torch.equal(
        found.optimizer_state()["default/w/exp_avg"], STATE["default/w/exp_avg"]
    )
    return found.position.step


def taken_over(run: Run) -> lease.Fence:
    """Another driver's fence, which has the run from now on."""

    def take(document) -> None:
        document["fence"] += 1
        document["holder"] |= {"token": "theirs", "pid": 7}

    document = lease.change(run.fence.url, run.fence.token, None, take)
    return lease.Fence(run.fence.url, "theirs", document["fence"])


def test_a_checkpoint_is_there_once_it_is_listed(run, tmp_path):
    url = write(run, 3)
    assert url == step_url(run.url, 3, run.fence) and url.endswith("/checkpoints/step-3.1")
    assert steps_in(run.url) == [3] and newest(run, tmp_path / "a") == 3
    # whole and sealed, and yet nobody's: its writer did not come to commit it
    objects.put_tree(local_copy(url, tmp_path / "copy"), step_url(run.url, 9, run.fence), "manifest.json")
    assert steps_in(run.url) == [3] and newest(run, tmp_path / "b") == 3
    later = run.fence.advanced()
    save(run, 4, later)
    assert objects.list_(run.url + "/checkpoints") == ["step-4.2"]  # what nobody committed is cleaned away


def test_one_who_was_overtaken_commits_no_checkpoint(run, tmp_path):
    write(run, 3)
    theirs = taken_over(run)
    with pytest.raises(LeaseError, match="was taken over by"):
        write(run, 6)
    assert steps_in(run.url) == [3] and objects.list_(run.url + "/checkpoints") == ["step-3.1"]
    write(run, 6, theirs)
    with pytest.raises(LeaseError):
        write(run, 6)  # the same step, over theirs
    with pytest.raises(LeaseError):
        prune(run.url, 1, 1, run.fence)
    assert newest(run, tmp_path / "a") == 6 and steps_in(run.url) == [6, 3]
    run._lost = LeaseError("known")  # closing lets go of nothing


def test_without_the_fence_a_late_writer_replaces_what_is_there(tmp_path):
    """The control: two writers, one folder."""
    position = Position(step=6, epoch=1, seed=7)
    write_checkpoint(str(tmp_path), position, save_adapter, STATE)
    write_checkpoint(str(tmp_path), position, save_adapter, {"default/w/exp_avg": torch.zeros(4)})
    assert not newest_good(str(tmp_path), tmp_path / "a").optimizer_state()["default/w/exp_avg"].any()


def test_one_who_hangs_at_any_write_of_a_checkpoint_changes_nothing_late(run, tmp_path):
    """For each write: meanwhile another takes the run over and commits the same step and a later one."""
    write(run, 1)
    with FaultyStorage().installed() as counted:
        save(run, 2)
    mine = run.fence
    for nth in range(1, counted.count + 1):
        step, theirs = 10 * nth, []

        def meanwhile(step=step, theirs=theirs):
            theirs.append(taken_over(run))
            write(run, step, theirs[0])
            write(run, step + 1, theirs[0])

        with FaultyStorage(nth, meanwhile=meanwhile).installed():
            try:
                save(run, step, mine)
            except LeaseError:
                pass
            else:  # it hung where all was committed, at cleaning up
                assert nth > 3
        if theirs:
            assert newest(run, tmp_path / str(nth)) == step + 1
            listed = json.loads(objects.read(run.url + "/run.json")[0])["checkpoints"]
            assert listed[f"step-{step + 1}.{theirs[0].number}"] == {"step": step + 1}
            # and the run is ours again, for the next write
            lease.change(
                run.fence.url,
                "theirs",
                None,
                lambda document: document["holder"].update(token=run.fence.token),
            )
            mine = run.fence.advanced()
    assert mine.number > run.fence.number


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("done", [False, True], ids=["not done", "answer lost"])
def test_every_write_of_a_checkpoint_may_fail(run, tmp_path, done, lasting):
    """Once: it is tried again. For good, as on a full disk: said, and the one before stays."""
    save(run, 1)
    with FaultyStorage().installed() as counted:
        save(run, 2)
    assert counted.count >= 4
    for nth in range(1, counted.count + 1):
        step = 10 * nth
        before = newest(run, tmp_path / f"before-{nth}")
        with FaultyStorage(nth, done=done, lasting=lasting).installed():
            try:
                write(run, step)
                is_written = True
            except StorageError as error:
                assert lasting and ("full" in str(error) or "answer was lost" in str(error))
                is_written = False
        found = newest(run, tmp_path / f"after-{nth}")
        assert found == step if is_written else found in (before, step)
        prune(run.url, 1, 1, run.fence)
        assert newest(run, tmp_path / f"pruned-{nth}") == found


def test_a_worker_may_die_at_every_write_of_a_checkpoint(tmp_path):
    with RunStore(tmp_path / "runs").open("small", small_job(), "d") as run:
        save(run, 1)
        nth, died, before = 0, True, 1
        while died:
            nth += 1
            step, fence = nth + 1, run.fence.advanced()
            died = dies_at(nth, lambda step=step, fence=fence: save(run, step, fence))
            found = newest(run, tmp_path / "scratch")
            assert found in (before, step) and (died or found == step)
            before = found
        assert nth > 15  # the walk has walked
        save(run, 1000, run.fence.advanced())
        left = [path.name for path in (Path(run.url) / "checkpoints").iterdir()]
        assert left == [f"step-1000.{nth + 2}"]  # whatever the dead left is cleaned away


@pytest.mark.parametrize("harm", FAULTS, ids=lambda harm: harm.__name__)
def test_a_damaged_one_is_left_out_in_one_line(tmp_path, harm):
    with RunStore(tmp_path / "runs").open("small", small_job(), "d") as run:
        write(run, 2)
        harm(Path(write(run, 4)))
        said: list[str] = []
        assert newest_good(run.url, tmp_path / "scratch", said.append).position.step == 2
        assert len(said) == 1 and "step-4.1 is left out: " in said[0] and "\n" not in said[0]


def test_any_one_byte_of_any_file_may_change(tmp_path):
    """Every byte of what is JSON, and some of the tensors': told apart or harmless, and never a crash."""
    with RunStore(tmp_path / "runs").open("small", small_job(), "d") as run:
        write(run, 2)
        folder = Path(write(run, 4))
        found = 0
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            whole = path.read_bytes()
            for at in range(0, len(whole), 1 if path.suffix == ".json" else 7):
                data = bytearray(whole)
                data[at] ^= 1 << (at % 8)
                path.write_bytes(data)
                said: list[str] = []
                chosen = newest_good(run.url, tmp_path / "scratch", said.append)
                assert chosen.position.step == (2 if said else 4) and len(said) <= 1
                assert said or path.name == "manifest.json"  # a key that nobody reads, a space
                found += bool(said)
            path.write_bytes(whole)
        assert found > 300 and newest(run, tmp_path / "scratch") == 4


@pytest.mark.parametrize("at", [0.0, 0.3, 0.999])
def test_one_flipped_bit_anywhere_is_found_on_s3_too(s3_bucket, tmp_path, at):
    with RunStore(s3_bucket.url + "/runs").open("small", small_job(), "d") as run:
        write(run, 2)
        url = write(run, 4) + "/" + OPTIMIZER_FILE
        data = bytearray(objects.read(url)[0])
        data[int(at * len(data))] ^= 4
        objects.write(url, bytes(data))
        said: list[str] = []
        assert newest_good(run.url, tmp_path / "scratch", said.append).position.step == 2
        assert len(said) == 1 and "does not match its sha256 sum" in said[0]


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Its document lists no checkpoints: those that are there count, and are listed from the next on."""
    with RunStore(tmp_path).open("small", small_job(), "d") as run:
        run.fence.commit(lambda document: document.pop("checkpoints"))
        write_checkpoint(run.url, Position(2, 1, 7, metrics={"eval_loss": 1.0}), save_adapter, STATE)
        assert newest(run, tmp_path / "a") == 2
        write(run, 4)
        assert steps_in(run.url) == [4, 2]
        save(run, 6)
        assert steps_in(run.url) == [6, 2]  # the best and the latest


# a whole run in this process


def test_a_run_over_slow_and_failing_storage_ends_like_an_undisturbed_one(tmp_path):
    torch.set_num_threads(1)
    spec = job(tmp_path, training={"max_steps": 6, "save_steps": 2})
    whole = train(request(tmp_path, spec, run="whole"))
    with FaultyStorage(2, delay_s=0.05).installed() as faults:
        slow = train(request(tmp_path, spec, run="slow"))
    assert faults.count >= 6 and same(adapter_of(whole), adapter_of(slow))
    # full from the second checkpoint on: the run ends with the cause, and goes on once there is room
    with FaultyStorage(3, lasting=True).installed(), pytest.raises(StorageError, match="the disk is full"):
        train(request(tmp_path, spec, run="full"))
    assert steps_in(str(tmp_path / "full")) == [2]
    told = Recorder()
    end = train(request(tmp_path, spec, run="full"), reporter=told)
    assert [event["step"] for event in told.of("progress")] == [3, 4, 5, 6]
    assert same(adapter_of(whole), adapter_of(end)) and whole.metrics == end.metrics


def test_a_whole_run_under_a_fence_stops_goes_on_and_is_overtaken_on_s3(s3_bucket, tmp_path):
    torch.set_num_threads(1)
    spec = job(tmp_path, training={"max_steps": 6, "save_steps": 2}, storage={"keep_latest": 2})
    whole = train(request(tmp_path, spec, run="whole"))
    with RunStore(s3_bucket.url + "/runs").open("small", small_job(), "d") as run:
        asked = request(tmp_path, spec, run="here")
        stopped = replace(asked, run_dir=run.url, fence=run.fence)
        assert train(stopped, reporter=Recorder(stop_after=3)).is_stopped
        assert steps_in(run.url) == [3, 2]
        later = replace(stopped, fence=run.fence.advanced())
        with pytest.raises(LeaseError, match="has a later group of workers: number 2, this is 1"):
            train(stopped)  # a group that was cut off and comes back
        assert steps_in(run.url) == [3, 2]
        end = train(later)
        assert end.adapter_dir == run.url + "/final.2" and end.metrics == whole.metrics
        final = local_copy(end.adapter_dir, tmp_path / "final")
        assert damage_of(final) is None and "final.1" not in objects.list_(run.url)
