"""A base of the hub is fetched once per machine, however many workers want it at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_dist import folder
from peft_dist.folder import FolderError, local_folder

WORKER = """
import contextlib, os, sys, time
from pathlib import Path
import huggingface_hub
from peft_dist import folder

place, number, locked = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "locked"

def download(repository, **asked):
    "As the hub's: what is in the cache is not fetched again."
    snapshot = place / "snapshot"
    if not snapshot.is_dir():
        (place / f"download-{number}").touch()
        time.sleep(1.0)
        snapshot.mkdir(exist_ok=True)
    return str(snapshot)

huggingface_hub.snapshot_download = download
if not locked:
    folder._hub_lock = lambda repository: contextlib.nullcontext()
(place / f"ready-{number}").touch()
while not (place / "go").exists():
    time.sleep(0.002)
print(folder.local_folder("organisation/base", ("*.json",)))
"""


def downloads(place: Path, locked: str) -> int:
    """How often two processes that begin together fetch one base."""
    place.mkdir()
    environment = os.environ | {"HF_HUB_CACHE": str(place / "hub")}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(place), str(number), locked],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(place.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline and all(worker.poll() is None for worker in workers)
        time.sleep(0.01)
    (place / "go").touch()
    assert [worker.communicate(timeout=60)[0].strip() for worker in workers] == [str(place / "snapshot")] * 2
    assert list((place / "hub").glob(".locks/*")) == []
    return len(list(place.glob("download-*")))


def test_two_workers_of_a_node_fetch_a_hub_base_once(tmp_path: Path) -> None:
    assert downloads(tmp_path / "locked", "locked") == 1
    assert downloads(tmp_path / "unlocked", "unlocked") == 2  # the negative control: they did meet


def test_a_cache_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("no folder, so that no lock can be made below it")
    monkeypatch.setattr(folder.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        folder.huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshot")
    )
    assert local_folder("organisation/base", ("*.json",)) == tmp_path / "snapshot"


def test_a_fetch_that_fails_lets_the_next_one_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def fails(*_: object, **__: object) -> str:
        raise OSError("the network is gone")

    monkeypatch.setattr(folder.huggingface_hub, "snapshot_download", fails)
    for _ in range(2):
        with pytest.raises(FolderError, match="the network is gone"):
            local_folder("organisation/base", ("*.json",))
    assert list((tmp_path / "cache" / ".locks").iterdir()) == []


def test_a_folder_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    assert local_folder("~/base", ("*.json",)) == tmp_path / "base"
    with pytest.raises(FolderError, match="'~/other' is not a directory"):
        local_folder("~/other", ("*.json",))
