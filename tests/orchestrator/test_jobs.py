"""Every file under jobs/ and every template is a job that validates; those under jobs/ are planned too."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import api
from orchestrator.plan.sweep import SweepPlan

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
TEMPLATES = sorted((ROOT / "orchestrator" / "templates").glob("*.yaml"))


def test_there_are_jobs():
    assert "quickstart.yaml" in [path.name for path in JOBS]


@pytest.mark.parametrize("path", JOBS + TEMPLATES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_it_validates_without_a_warning(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert api.validate(path).warnings == ()


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_it_is_planned(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = api.plan(path)
    if isinstance(plan, SweepPlan):
        assert plan.trials > 1 and plan.layout.concurrent >= 1 and plan.memory.total > plan.trial.memory.base
        plan = plan.trial
    rows = plan.num_workers * plan.micro_batch_size * plan.gradient_accumulation_steps
    if path.name == "qlora-zero3.yaml":  # its base is on a hub, and tests have no network
        assert "meta-llama/Llama-3.1-70B" in plan.notes[0] and plan.memory is None
        assert (plan.zero_stage, plan.bundle["GPU"], plan.placement) == (3, 1, "PACK")
        return
    assert rows == plan.global_batch_size and plan.adapter_parameters
    if plan.memory is None:  # the activations of an encoder-decoder are not counted, and the plan says so
        assert path.name == "seq2seq.yaml"
        assert (
            "Memory is not estimated: the activations of T5ForConditionalGeneration are not known."
            in plan.notes
        )
    else:
        assert plan.memory.total > plan.memory.base > 0
