"""A job below a Ray that ignores SIGINT, as one does that a shell's background job started: it hears what its cluster
sends all the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from orchestrator.home import home
from orchestrator.store import RunStore
from tests.patience import patience


def deaf() -> None:
    """What such a Ray hands down to all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def start(*arguments: str, stop_signal: str = "SIGINT") -> subprocess.Popen:
    environment = {**os.environ, "RAY_JOB_STOP_SIGNAL": stop_signal, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *arguments],
        env=environment, preexec_fn=deaf, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def reading(fifo: Path) -> int:
    """Returns once a process reads `fifo`, with an end of it that keeps the process waiting."""
    return os.open(fifo, os.O_WRONLY)


def test_a_job_that_still_gets_ready_leaves_at_once(tmp_path):
    os.mkfifo(tmp_path / "job.yaml")
    process = start("run", str(tmp_path / "job.yaml"))
    end = reading(tmp_path / "job.yaml")
    try:
        time.sleep(0.1)  # from the opening to the reading
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=patience(30))
    finally:
        os.close(end)
    assert process.returncode == 130


def test_a_command_in_a_shells_background_stays_deaf(tmp_path):
    """What nobody stops by SIGINT keeps what its shell asked for: Ctrl-C is not meant for it."""
    os.mkfifo(tmp_path / "job.yaml")
    process = start("validate", str(tmp_path / "job.yaml"), stop_signal="")
    end = reading(tmp_path / "job.yaml")
    try:
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
    finally:
        os.close(end)  # the file ends
    process.communicate(timeout=patience(30))
    assert process.returncode not in (0, 130)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_that_trains_saves_and_leaves(local_ray, tmp_path, repository):
    assets = repository / "jobs" / "assets"
    job = {
        "name": "deaf",
        "model": {"base_model": str(assets / "tiny-llama")},
        "data": {"datasets": [{"path": str(assets / "python-docs.jsonl"), "type": "chat"}]},
        "adapter": {"type": "lora", "r": 4},
        "training": {"num_epochs": 100, "micro_batch_size": 1, "save_steps": 100_000, "learning_rate": 1e-3},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    process = start("run", str(tmp_path / "job.yaml"), "--json")
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if json.loads(line).get("event") == "progress":
                break
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=patience(60))
        assert time.monotonic() - asked < patience(28)  # a cluster would kill it then
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "The checkpoint of step" in json.loads(said.splitlines()[-1])["error"]["hint"]
    (run,) = [run for run in RunStore(home() / "runs").list() if run.name == "deaf"]
    assert run.state == "interrupted"
