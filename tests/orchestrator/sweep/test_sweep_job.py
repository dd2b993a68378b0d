"""Sweeps with workers that train: `jobs/sweep.yaml` as a user runs it, and a trial beside its lone run."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# minutes of training
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.matrix, pytest.mark.timeout(1800)]

SMALL = """
name: small
model: {{base_model: {root}/jobs/assets/tiny-llama}}
data: {{datasets: [{{path: {root}/jobs/assets/python-docs.jsonl, type: chat}}], val_set_size: 32, sequence_len: 128}}
adapter: {{type: lora, r: 4}}
training: {{max_steps: 12, eval_steps: 3, micro_batch_size: 4, learning_rate: 1e-3}}
tracking: {{mlflow: false}}
sweep:
  num_trials: 4
  max_concurrent: 4
  scheduler: {{type: asha, reduction_factor: 2}}
  space:
    training.learning_rate: {{loguniform: [1e-4, 1e-2]}}
    paired: [{{adapter.type: lora, adapter.r: 4}}, {{adapter.type: lora, adapter.r: 8}}]
"""


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """A home of their own, ended with its Ray."""
    with tempfile.TemporaryDirectory(prefix="rps-") as home:
        found = {**os.environ, "RAYPEFT_HOME": home, "OMP_NUM_THREADS": "1"}
        raypeft(found, "up", "--num-cpus", "2")  # two workers have a place on any machine
        yield found
        subprocess.run([sys.executable, "-m", "orchestrator", "down"], env=found, check=True)


def raypeft(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "orchestrator", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_sweep_of_the_readme_beats_the_quickstart(environment, repository, monkeypatch):
    monkeypatch.chdir(repository)
    said = raypeft(environment, "run", "jobs/sweep.yaml", "--set", "deploy=null", "--json")
    result = json.loads(said.splitlines()[-1])
    shown = json.loads(raypeft(environment, "sweep", "show", "sweep", "--json"))
    assert len(shown["trials"]) == 24 and {each["state"] for each in shown["trials"]} == {
        "finished",
        "stopped",
    }
    assert result["metrics"]["eval_loss"] < 4.1 < result["metrics"]["base.eval_loss"]
    lineage = json.loads(raypeft(environment, "show", result["adapter"], "--json"))["lineage"]
    assert lineage["sweep"]["trial"] == shown["best"] and lineage["sweep"]["sweep"] == result["job"]
    assert Path(shown["report"]).read_text().count("data:image/png") == 3


@pytest.mark.parametrize(
    "on",
    [
        (),
        ("deepspeed=zero2", "resources.num_workers=2"),
        ("deepspeed=zero3", "resources.num_workers=2"),
        ("model.load_in_8bit=true",),
        ("model.load_in_4bit=true",),
    ],
    ids=["plain", "zero2", "zero3", "int8", "nf4"],
)
def test_a_trial_of_a_pack_ends_as_it_does_alone(on, environment, repository, tmp_path):
    job = tmp_path / "small.yaml"
    job.write_text(SMALL.format(root=repository).replace("{type: asha, reduction_factor: 2}", "none"))
    base = [f"--set={each}" for each in on]
    raypeft(environment, "run", str(job), "--new", *base)
    shown = json.loads(raypeft(environment, "sweep", "show", "small", "--json"))
    trial = shown["trials"][0]
    settings = [f"--set={key}={value}" for key, value in trial["parameters"].items()]
    alone_too = ("--set=sweep=null", "--set=name=alone", *base, *settings)
    said = raypeft(environment, "run", str(job), "--new", *alone_too, "--json")
    alone = json.loads(said.splitlines()[-1])["metrics"]["eval_loss"]
    assert alone == pytest.approx(trial["metrics"]["eval_loss"], abs=1e-3)
