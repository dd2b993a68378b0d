"""`jobs/qlora.yaml` to its end, two workers over Ray, each with its share of the codes; and its template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from orchestrator import api
from orchestrator.plan import make_plan
from orchestrator.plan.model_sizes import read_sizes
from orchestrator.runner import TrainRequest
from orchestrator.train.worker.run import train

ROOT = Path(__file__).parents[2]
# Few rows, few steps; nothing is deployed.
SHORT = [
    "training.max_steps=2",
    "training.micro_batch_size=2",
    "training.global_batch_size=4",
    "data.val_set_size=4",
    "data.sequence_len=48",
    "deploy=null",
]
ALONE = ["resources.num_workers=1", "deepspeed=zero0"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYPEFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_init_writes_a_job_that_is_planned(raypeft, home):
    assert raypeft("init", "qlora")[0] == 0
    assets = ROOT / "jobs" / "assets"
    found = [
        f"model.base_model={assets / 'tiny-llama'}",
        f"data.datasets.0.path={assets / 'python-docs.jsonl'}",
        "resources.cpus_per_worker=0.5",
    ]
    arguments = [word for each in found for word in ("--set", each)]
    code, out, err = raypeft("plan", "qlora.yaml", *arguments, "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert (plan["zero_stage"], plan["num_workers"], plan["global_batch_size"]) == (3, 2, 16)
    # Four bits a weight of the linear layers, and what is not quantised; a quarter of all at most, shared by two.
    _, out, _ = raypeft("plan", "qlora.yaml", *arguments, "--set", "model.load_in_4bit=false", "--json")
    assert 0 < plan["memory"]["base"] < json.loads(out)["memory"]["base"]


@pytest.mark.ray  # the workers, and the ranks that share the codes, are the real ones
@pytest.mark.slow  # a start of Ray, and of two workers with torch and DeepSpeed
@pytest.mark.timeout(600)
def test_two_workers_train_it_to_a_version(tmp_path, local_ray, monkeypatch):
    monkeypatch.chdir(ROOT)
    events: list[dict] = []
    overrides = [*SHORT, f"storage.path={tmp_path / 'runs'}"]
    result = api.run("jobs/qlora.yaml", overrides=overrides, on_event=events.append)
    assert result.state == "done" and result.adapter == "python-docs-qlora@1"
    version = api.show("python-docs-qlora@1")
    assert version.lineage.quantization and version.lineage.quantization.startswith("nf4")
    assert any("2 CPU workers, ZeRO-3, 4 rows a step" in str(event.get("message")) for event in events)
    # The oracle: one process, nothing sharded, the same codes.
    spec = api.load("jobs/qlora.yaml", [*SHORT, *ALONE]).spec
    alone = train(
        TrainRequest(
            spec,
            make_plan(spec, None, read_sizes(spec.model.base_model)),
            str(tmp_path / "alone"),
            run_id="alone",
            data_hash="0" * 8,
        )
    )
    losses = [event["loss"] for event in events if event["event"] == "progress"]
    assert len(losses) == alone.steps == 2
    for name in ("train_loss", "eval_loss", "base.eval_loss"):
        assert result.metrics[name] == pytest.approx(alone.metrics[name], abs=1e-3)
    assert torch.isfinite(torch.tensor(losses)).all()
