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
from orchestrator.runner import TrainRequest
from orchestrator.train.rows.tokenizer import load_tokenizer
from orchestrator.train.worker.data import load_examples
from orchestrator.train.worker.run import train

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


@pytest.fixture
def cleared(local_ray):
    """The session's Ray, on which no endpoint stays."""
    yield local_ray
    for row in api.endpoints():
        api.undeploy(row.name)


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


# What is asked of each job's endpoint, and what a person then reads.
ASKED = {
    "classification": ("python-kinds", "Return the length of an object.", {}),
    "token-classification": ("python-signatures", "os.path.join ( a , *paths )", {}),
    "qa": ("python-spans", "What does it return?", {"context": "len(obj): Return the length of obj."}),
    "seq2seq": ("python-names", "os.path.join(a, *paths)", {}),
    "embedding": ("python-vectors", "Return the length of an object.", {}),
}


def ends_at_a_live_endpoint(kind, tmp_path, steps):
    """The whole job, shortened to some steps and without its gate; returns what its endpoint says."""
    name, question, more = ASKED[kind]
    shorter = [
        f"training.max_steps={steps}",
        "eval.max_rows=20",
        "deploy.gate=null",
        f"storage.path={tmp_path / 'runs'}",
    ]
    result = api.run(f"jobs/{kind}.yaml", overrides=shorter)
    assert result.state == "done" and result.adapter == f"{name}@1" and result.endpoint is not None
    assert api.show(f"{name}@production").version == 1
    (row,) = [each for each in api.endpoints() if f"{name}@1" in each.adapters]
    assert row.state == "live"
    return api.ask(name, question, **more), api.ask_head(name, question, **more)


@pytest.mark.ray  # workers, registry and endpoint are the real ones
@pytest.mark.slow  # starts a Ray
def test_a_classifier_ends_at_a_live_endpoint(tmp_path, cleared):
    said, row = ends_at_a_live_endpoint("classification", tmp_path, 25)
    labels = {each["label"] for each in row["scores"]}
    assert labels == {"class", "function", "module"} and row["label"] in said.splitlines()[0]
    assert sum(each["score"] for each in row["scores"]) == pytest.approx(1, abs=1e-3)
    version = api.show("python-kinds@production")
    assert "raypeft_task.json" in (version.files or {})
    found = api.evaluate(
        "python-kinds@1", "jobs/assets/python-classification.jsonl", type="classification", max_rows=20
    )
    assert {"accuracy", "f1", "base.accuracy", "eval_loss"} <= set(found)
    # the base's own name has no head that was trained; a version of another task has an endpoint of its own
    base = api.endpoints()[0].base
    with pytest.raises(Exception, match="no trained head"):
        api.ask(base, "x", url=api.endpoints()[0].url)


@pytest.mark.ray  # likewise
@pytest.mark.slow  # starts a Ray
@pytest.mark.matrix  # the same chain for the other tasks, a minute each
@pytest.mark.parametrize("kind", [kind for kind in ASKED if kind != "classification"])
def test_a_job_of_each_task_ends_at_a_live_endpoint(kind, tmp_path, cleared):
    said, row = ends_at_a_live_endpoint(kind, tmp_path, 6)
    match kind:
        case "token-classification":
            assert all({"label", "score", "start", "end", "text"} <= set(each) for each in row["entities"])
            assert "(no entities)" in said or row["entities"][0]["text"] in said
        case "qa":
            assert row["answers"][0]["text"] in said or "(no answer" in said
        case "seq2seq":
            assert row is None and isinstance(said, str)
        case "embedding":
            assert sum(number * number for number in row["embedding"]) == pytest.approx(1, abs=1e-4)
            assert said.startswith(f"{len(row['embedding'])} numbers: ")
