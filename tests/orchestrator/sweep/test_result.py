"""What a sweep came to, as it is found again: by its folder, and in what another process printed."""

import json
import math

import pytest

from orchestrator import api
from orchestrator.errors import RunError
from orchestrator.spec.load import load_job_text
from orchestrator.store import RunStore
from orchestrator.sweep import table
from orchestrator.sweep.result import SweepResult, read_sweep
from orchestrator.sweep.trials import trials_url

JOB = """
name: x
model: {base_model: b}
data: {datasets: [{path: a.jsonl}]}
sweep: {space: {adapter.r: {choice: [4, 8]}}}
"""


@pytest.fixture
def store(place):
    """A sweep whose job has its runs elsewhere: two trials, of which one came to nothing."""
    spec = load_job_text(JOB, "jobs/x.yaml").spec
    store = RunStore(place)
    with store.open("x", spec, "data") as run:
        for number, loss in enumerate((math.nan, 0.5)):
            with RunStore(trials_url(run.url)).open(f"trial-{number:03d}", spec, "data") as trial:
                trial.append_metrics({"event": "eval", "t": 1.0, "step": 4, "metrics": {"eval_loss": loss}})
                trial.set_state("starting", trial=number, parameters={"adapter.r": 4 * (number + 1)})
                trial.set_state("interrupted")
    return store


def test_a_sweep_is_found_by_its_folder(store, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYPEFT_HOME", str(tmp_path / "home"))
    url = store.get("x").url
    assert api.sweep(url).id == api.status(f"{url}/").id == store.get("x").id
    assert [trial.number for trial in api.sweep(f"{store.url}/x").trials] == [1, 0]
    with pytest.raises(RunError, match="there is no run 'x'"):
        api.sweep("x")


def test_what_is_printed_is_read_back(store):
    result = read_sweep(store.get("x"))
    printed = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    again = SweepResult.from_dict(printed)
    assert again.to_dict() == result.to_dict()
    assert table.rows(again.sweep, again.trials) == table.rows(result.sweep, result.trials)
    assert table.columns(again.sweep, again.trials) == [
        "trial",
        "state",
        "adapter.r",
        "eval_loss",
        "steps",
        "seconds",
    ]


def test_no_trial_runs_where_nobody_is_at_work_on_the_sweep(store):
    with store.open("x", load_job_text(JOB, "jobs/x.yaml").spec, "data") as run:
        run.set_state("starting")
        assert {trial.state for trial in read_sweep(store.get("x")).trials} == {"running"}
        run.set_state("interrupted")
    assert {trial.state for trial in read_sweep(store.get("x")).trials} == {"interrupted"}
