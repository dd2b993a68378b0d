"""Faults of a checkpoint: partial, truncated, altered; none is ever chosen, and the last good one stays."""

import json
from pathlib import Path

import pytest
import torch

from orchestrator import objects
from orchestrator.train.worker.checkpoint import (
    MANIFEST,
    OPTIMIZER_FILE,
    Position,
    damage_of,
    newest_good,
    prune,
    step_url,
    steps_in,
    write_checkpoint,
)

STATE = {"default/w/exp_avg": torch.arange(4.0), "default/w/step": torch.tensor(3.0)}


def save_adapter(folder: str) -> None:
    Path(folder).mkdir(parents=True)
    (Path(folder) / "adapter_config.json").write_text("{}")


def write(run_dir, step, loss=None) -> Path:
    metrics = {} if loss is None else {"eval_loss": loss}
    position = Position(step=step, epoch=1, seed=7, metrics=metrics)
    return Path(write_checkpoint(str(run_dir), position, save_adapter, STATE))


def test_what_is_written_is_read(tmp_path):
    write(tmp_path, 3, loss=0.5)
    found = newest_good(str(tmp_path), tmp_path / "scratch")
    assert found.position == Position(step=3, epoch=1, seed=7, metrics={"eval_loss": 0.5})
    assert found.adapter_dir.is_dir()
    state = found.optimizer_state()
    assert state.keys() == STATE.keys() and all(torch.equal(state[key], STATE[key]) for key in STATE)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}


def test_other_ranks_write_nothing(tmp_path):
    write_checkpoint(str(tmp_path), Position(1, 1, 7), save_adapter, None)
    assert list(tmp_path.iterdir()) == []


def test_nothing_there(tmp_path):
    assert newest_good(str(tmp_path), tmp_path / "scratch") is None


def truncate(folder: Path) -> None:
    path = folder / OPTIMIZER_FILE
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / OPTIMIZER_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def forget_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def lose_file(folder: Path) -> None:
    (folder / "adapter" / "adapter_config.json").unlink()


def garble_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


def grow_old(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))


FAULTS = {
    truncate: f"{OPTIMIZER_FILE} has",
    flip: f"{OPTIMIZER_FILE} does not match its sha256 sum",
    forget_manifest: "it has no manifest: it was not finished",
    lose_file: "adapter_config.json is missing",
    garble_manifest: "its manifest is not readable",
    grow_old: "format 99",
}


@pytest.mark.parametrize("harm", FAULTS, ids=lambda harm: harm.__name__)
def test_a_damaged_one_is_never_chosen(tmp_path, harm):
    write(tmp_path, 2)
    harm(write(tmp_path, 4))
    said: list[str] = []
    found = newest_good(str(tmp_path), tmp_path / "scratch", said.append)
    assert found.position.step == 2
    assert len(said) == 1 and "step-4 is left out" in said[0] and FAULTS[harm] in said[0]


@pytest.mark.parametrize("harm", FAULTS, ids=lambda harm: harm.__name__)
def test_pruning_never_takes_the_last_good_one(tmp_path, harm):
    write(tmp_path, 2)
    harm(write(tmp_path, 4))
    assert prune(str(tmp_path), keep_best=1, keep_latest=1) == [4]
    assert steps_in(str(tmp_path)) == [2]
    assert damage_of(Path(step_url(str(tmp_path), 2))) is None


def test_only_damaged_ones_are_left_alone(tmp_path):
    flip(write(tmp_path, 2))
    assert prune(str(tmp_path), 1, 1) == []


def test_pruning_keeps_the_best_and_the_latest(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        write(tmp_path, step, loss)
    prune(str(tmp_path), keep_best=2, keep_latest=2)
    assert steps_in(str(tmp_path)) == [5, 4, 3, 2]
    prune(str(tmp_path), keep_best=1, keep_latest=1)
    assert steps_in(str(tmp_path)) == [5, 2]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path):
    flip(write(tmp_path, 2))
    write(tmp_path, 2)
    assert newest_good(str(tmp_path), tmp_path / "scratch").position.step == 2


def test_a_failing_write_leaves_the_earlier_one(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def fail(source, url, manifest=None):
        raise objects.StorageError("the disk is full.", where=str(url))

    monkeypatch.setattr(objects, "put_tree", fail)
    with pytest.raises(objects.StorageError, match="the disk is full"):
        write(tmp_path, 2)
    assert steps_in(str(tmp_path)) == [1]
    assert newest_good(str(tmp_path), tmp_path / "scratch").position.step == 1
