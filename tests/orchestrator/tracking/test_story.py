"""What trackers are told of a job: from its events, its version and its end."""

import dataclasses

import pytest

from orchestrator.errors import Interrupted, TrainingError
from orchestrator.spec.load import load_job_text
from orchestrator.tracking.session import Tracking
from orchestrator.tracking.story import Story
from tests.orchestrator import test_service
from tests.orchestrator.test_service import job

house = test_service.house

SWEEP = """
model: {base_model: b}
data: {datasets: [{path: a.jsonl}]}
sweep: {space: {training.learning_rate: {choice: [1e-4, 5e-4]}}}
"""


class Told(Tracking):
    """Trackers that are told here."""

    def __init__(self) -> None:
        super().__init__([{"kind": "mlflow", "uri": "http://m", "experiment": "docs"}])
        self.messages, self.said, self.closed = [], [], False

    def run(self, key, **given):
        with self._lock:
            self._started = True  # no process
        return super().run(key, **given)

    def _put(self, message):
        self.messages.append(message)

    def of(self, op):
        return [message for message in self.messages if message["op"] == op]

    def warnings(self):
        said, self.said = self.said, []
        return said

    def close(self):
        self.closed = True


@pytest.fixture
def told(house):
    tracking = Told()
    house.environment = dataclasses.replace(house.environment, open_tracking=lambda spec, secrets: tracking)
    return tracking


def test_parameters_metrics_lineage_and_the_version_are_told(house, told):
    result = house.run(job())
    (start,) = told.of("start")
    run = house.environment.runs.get("docs")
    assert start["key"] == run.id and start["parent"] is None
    assert start["params"]["training"]["learning_rate"] == 2e-4 and start["params"]["adapter"]["r"] == 8
    steps = [(each["step"], sorted(each["values"])) for each in told.of("metrics")]
    assert steps[0][0] == 1 and "loss" in steps[0][1]
    assert steps[-1] == (1, ["base.eval_loss", "eval_loss"])
    tags = told.of("tags")[0]["tags"]
    assert tags["raypeft.version"] == "docs@1" and tags["raypeft.base"] == "tiny-llama"
    assert tags["raypeft.gate_passed"] == "True" and tags["raypeft.data_hash"] == run.data_hash
    assert {each["file"] for each in told.of("text")} == {"job.yaml", "lineage.json"}
    assert told.messages[-1] == {"op": "end", "key": run.id, "status": "finished"} and told.closed
    assert result.notes[0] == f"MLflow: run '{run.id}' of experiment 'docs': http://m"
    assert result.notes[0] in house.said()


def test_what_is_done_is_told_nothing_again(house, told):
    house.run(job())
    told.messages.clear()
    assert house.run(job()).already and told.messages == []


@pytest.mark.parametrize(
    ("error", "status"), [(TrainingError("no"), "failed"), (Interrupted("later"), "killed")]
)
def test_it_is_told_how_a_run_ended(house, told, error, status):
    house.runner.error = error
    with pytest.raises(type(error)):
        house.run(job())
    assert told.of("end")[0]["status"] == status and told.closed
    house.runner.error = None
    house.run(job())
    starts = told.of("start")
    assert len(starts) == 2 and starts[0]["key"] == starts[1]["key"], "it goes on under its key"


def test_warnings_of_trackers_are_events_of_the_run(house, told):
    told.said = ["tracking.mlflow: down."]
    house.run(job())
    kept = [each for each in house.environment.runs.events("docs") if each["event"] == "warning"]
    assert [each["message"] for each in kept] == ["tracking.mlflow: down."]


def test_a_trial_is_a_run_within_the_sweeps():
    tracking = Told()
    spec = load_job_text(SWEEP, "jobs/x.yaml").spec
    story = Story(tracking, "x-12", spec)
    story.begin()
    rate = {"training.learning_rate": 5e-4}
    story.take({"event": "trial", "trial": 3, "id": "trial-003-ab", "state": "started", "parameters": rate})
    story.take({"event": "progress", "trial": 3, "step": 1, "loss": 2.0})
    story.take({"event": "eval", "trial": 3, "step": 1, "metrics": {"eval_loss": 1.5}})
    story.take({"event": "trial", "trial": 3, "id": "trial-003-ab", "state": "stopped"})
    story.end("finished")
    whole, trial = tracking.of("start")
    assert (whole["key"], whole["parent"]) == ("x-12", None)
    assert (trial["key"], trial["name"], trial["parent"]) == ("x-12/trial-003-ab", "trial-003-ab", "x-12")
    params = trial["params"]
    assert params["training"]["learning_rate"] == 5e-4 and params["sweep"] is None
    assert [(each["key"], each["values"]) for each in tracking.of("metrics")] == [
        ("x-12/trial-003-ab", {"loss": 2.0}),
        ("x-12/trial-003-ab", {"eval_loss": 1.5}),
    ]
    assert [(each["key"], each["status"]) for each in tracking.of("end")] == [
        ("x-12/trial-003-ab", "finished"),
        ("x-12", "finished"),
    ]
