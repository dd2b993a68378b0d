"""The jobs of `jobs/`, one a task, on their real rows: in this process and shortened, against what a guess gets; one of
them through Ray, to the registry."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from orchestrator import api
from orchestrator.gate import check
from orchestrator.plan import make_plan
from orchestrator.plan.model_sizes import read_sizes
from orchestrator.registry import Registry
from orchestrator.runner import TrainRequest
from orchestrator.train.data import load_examples
from orchestrator.train.run import train
from orchestrator.train.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]

# Steps that are enough to pass each job's own gate: a third of the job or less.
SHORT = {
    "classification": ["training.num_epochs=1"],
    "token-classification": ["training.max_steps=60"],
    "qa": ["training.max_steps=90"],
    "seq2seq": ["training.num_epochs=3"],
    "embedding": ["training.num_epochs=2", "eval.max_rows=60"],
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow  # a few hundred rows through a base of three million parameters, ten seconds to a minute each
@pytest.mark.parametrize("kind", SHORT)
def test_it_learns_what_a_guess_does_not_know(kind, tmp_path):
    spec = api.load(f"jobs/{kind}.yaml", SHORT[kind]).spec
    plan = make_plan(spec, None, read_sizes(spec.model.base_model))
    end = train(TrainRequest(spec, plan, str(tmp_path / "run"), run_id="run", data_hash="0" * 8))
    found = end.metrics
    assert found["eval_loss"] < found["base.eval_loss"]
    if kind == "classification":
        rows = load_examples(spec, load_tokenizer(spec.model), max_len=512).evaluation
        most = Counter(row.label for row in rows).most_common(1)[0][1] / len(rows)
        assert found["accuracy"] > most > 0.4 and found["f1"] > found["base.f1"]
    else:
        assert spec.deploy is not None
        gated = {
            "token-classification": ("f1", 0.7),
            "qa": ("exact_match", 0.3),
            "seq2seq": ("chrf", 30.0),
            "embedding": ("recall_at_10", 10 / 60),  # what any order gets
        }
        name, least = gated[kind]
        assert found[name] > max(least, found[f"base.{name}"])
        verdict = check(spec.deploy.gate, found, has_production=False)
        assert verdict.passed or kind == "qa", verdict.reasons


@pytest.mark.ray  # the workers, the gate and the registry are the real ones
@pytest.mark.slow  # starts a Ray
def test_a_classifier_passes_its_gate_and_takes_its_alias(tmp_path, local_ray):
    shorter = [
        "training.max_steps=25",
        "deploy.gate={all: [f1 > base.f1]}",
        f"storage.path={tmp_path / 'runs'}",
    ]
    events: list[dict] = []
    result = api.run("jobs/classification.yaml", overrides=shorter, on_event=events.append)
    assert result.state == "registered, not deployed" and result.adapter == "python-kinds@1"
    assert "python-kinds@production, not served" in events[-1]["message"]
    version = api.show("python-kinds@production")
    assert (
        version.version == 1 and version.lineage.gate_passed and "raypeft_task.json" in (version.files or {})
    )
    found = api.evaluate(
        "python-kinds@1", "jobs/assets/python-classification.jsonl", type="classification", max_rows=20
    )
    assert {"accuracy", "f1", "base.accuracy", "eval_loss"} <= set(found)
    with pytest.raises(Exception, match=r"python-kinds@1: serving of SEQ_CLS is not built yet"):
        api.deploy("python-kinds@1")
    assert Registry(api.registry_url()).versions("python-kinds")
