"""The use cases against a runner and endpoints in memory, a real store and a real registry on disk."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from orchestrator import objects
from orchestrator.cluster import ClusterFacts, NodeFacts, cluster_at
from orchestrator.errors import (
    Interrupted,
    OutOfTimeError,
    PlacementError,
    RegistryError,
    RunError,
    ServeError,
    TrainingError,
)
from orchestrator.registry import AdapterVersion, Registry
from orchestrator.runner import Event, Spent, TrainOutcome, TrainRequest
from orchestrator.service import (
    Comparison,
    Deployment,
    Environment,
    OnEvent,
    RunResult,
    StopRequest,
    run_job,
    served_task,
)
from orchestrator.spec.canonical import resolved_yaml
from orchestrator.spec.job import DeploySpec, JobSpec
from orchestrator.spec.load import load_job_mapping
from orchestrator.spec.trials import trial_job
from orchestrator.store import RunStore
from orchestrator.sweep.trial_runs import TrialRuns

from .adapters import lineage, make_adapter

ASSETS = Path(__file__).parents[2] / "jobs" / "assets"


@dataclass
class MemoryRunner:
    """Trains nothing: leaves an adapter and the metrics that it was given."""

    metrics: dict[str, float]
    error: BaseException | None = None
    waits: bool = False
    more: list[Event] = field(default_factory=list)
    eval_rows: tuple[str, ...] = ("aa", "bb")
    spec: JobSpec | None = None
    """The job that it says it trained, as a sweep says its best trial's."""
    requests: list[TrainRequest] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def start(self, request: TrainRequest) -> None:
        self.requests.append(request)

    def events(self) -> Iterator[Event]:
        yield {"event": "state", "state": "training", "message": "step 0 of 2"}
        yield {
            "event": "progress", "step": 1, "total_steps": 2, "epoch": 0, "loss": 3.0, "learning_rate": 1e-3,
            "grad_norm": 1.0, "tokens_per_s": 10.0, "eta_s": 1.0,
        }  # fmt: skip
        if self.waits:
            assert self.stopped.wait(10), "nobody asked the runner to stop"
        yield from self.more

    def stop(self) -> None:
        self.stopped.set()

    def outcome(self) -> TrainOutcome:
        if self.error is not None:
            raise self.error
        if self.stopped.is_set():
            raise Interrupted("run was stopped after 1 step(s).", hint="Run the same command again.")
        run_dir = self.requests[-1].run_dir
        make_adapter(Path(run_dir) / "final", value=float(len(self.requests)))
        objects.write(f"{run_dir}/train_rows.txt", b"11\n22\n")
        objects.write(f"{run_dir}/eval_rows.txt", "".join(f"{row}\n" for row in self.eval_rows).encode())
        files = (
            f"{run_dir}/final",
            dict(self.metrics),
            2,
            0.5,
            f"{run_dir}/train_rows.txt",
            f"{run_dir}/eval_rows.txt",
        )
        return TrainOutcome(*files, question="What?", spec=self.spec)


@dataclass
class MemoryEndpoints:
    """Serves nothing; remembers what it was asked for."""

    registry: Registry
    state: str = "live"
    rollout: str | None = None
    error: Exception | None = None
    deployed: list[str] = field(default_factory=list)

    def deploy(
        self,
        version: AdapterVersion,
        base_model: str,
        revision: str,
        deploy: DeploySpec,
        *,
        force: bool,
        on_event: OnEvent,
    ) -> Deployment:
        if self.error is not None:
            raise self.error
        self.deployed.append(version.ref)
        if self.state == "live":
            self.registry.set_alias(version.name, version.version, deploy.alias)
        return Deployment("tiny", "http://127.0.0.1:1/tiny/v1", version.ref, "tiny", self.state, self.rollout)

    def status(self) -> list[object]:
        return []

    def undeploy(self, name: str, adapter: str | None = None) -> None:
        self.deployed.remove(adapter or name)


@dataclass
class House:
    """An environment and what is behind it."""

    runner: MemoryRunner
    endpoints: MemoryEndpoints
    environment: Environment

    def run(self, spec: JobSpec, **options: object) -> RunResult:
        self.events: list[Event] = []
        return run_job(spec, self.environment, on_event=self.events.append, **options)  # type: ignore[arg-type]

    def said(self) -> str:
        return "\n".join(str(event.get("message", "")) for event in self.events)


@pytest.fixture
def house(tmp_path) -> House:
    registry = Registry(tmp_path / "registry")
    runner = MemoryRunner({"eval_loss": 1.0, "base.eval_loss": 2.0})
    endpoints = MemoryEndpoints(registry)
    facts = ClusterFacts((NodeFacts(4, memory=8 << 30),), 4, 0, source="a test")
    environment = Environment(
        cluster=cluster_at("http://127.0.0.1:1"),
        runs=RunStore(tmp_path / "runs"),
        registry=registry,
        open_runner=lambda: runner,
        open_endpoints=lambda: endpoints,
        facts=lambda: facts,
    )
    return House(runner, endpoints, environment)


def job(**sections: object) -> JobSpec:
    values = {
        "name": "docs",
        "model": {"base_model": str(ASSETS / "tiny-llama")},
        "data": {"datasets": [{"path": str(ASSETS / "python-docs.jsonl")}]},
        "deploy": {"gate": {"all": ["eval_loss < base.eval_loss"]}},
        **sections,
    }
    return load_job_mapping({key: value for key, value in values.items() if value is not None}).spec


def test_a_job_is_trained_gated_registered_and_deployed(house):
    result = house.run(job())
    assert (result.state, result.adapter, house.endpoints.deployed) == ("done", "docs@1", ["docs@1"])
    assert result.metrics == {"eval_loss": 1.0, "base.eval_loss": 2.0}
    assert result.first_step_s == 0.5 and result.question == "What?"
    version = house.environment.registry.get("docs")
    assert version.lineage.gate_passed and version.lineage.parent is None
    assert house.environment.registry.train_rows(version) == {"11", "22"}
    record = house.environment.runs.get("docs")
    assert (record.state, record.adapter) == ("done", "docs@1")
    assert [event["step"] for event in house.environment.runs.metrics("docs")] == [1]


@pytest.mark.parametrize(
    ("keys", "name"), [({}, None), ({"load_in_8bit": True}, "int8"), ({"load_in_4bit": True}, "nf4+double")]
)
def test_a_version_records_how_its_base_was_kept_and_is_deployed_all_the_same(house, keys, name):
    result = house.run(job(model={"base_model": str(ASSETS / "tiny-llama"), **keys}))
    version = house.environment.registry.get("docs")
    assert version.lineage.quantization == name and house.endpoints.deployed == ["docs@1"]
    assert result.state == "done" and version.to_dict()["lineage"]["quantization"] == name


def classifier(**sections: object) -> JobSpec:
    rows = {"path": str(ASSETS / "python-classification.jsonl"), "type": "classification"}
    gate = {"gate": {"all": ["accuracy > 0.5"]}, "alias": "best"}
    return job(data={"datasets": [rows]}, deploy=gate, **sections)


def test_a_job_of_another_task_is_deployed_like_any(house):
    house.runner.metrics["accuracy"] = 0.9
    result = house.run(classifier())
    assert (result.state, result.adapter) == ("done", "docs@1") and house.endpoints.deployed == ["docs@1"]


def test_a_job_of_another_task_is_refused_by_its_gate(house):
    house.runner.metrics["accuracy"] = 0.1
    assert house.run(classifier()).state == "registered, refused by the gate"
    assert house.endpoints.deployed == [] and house.environment.registry.alias("docs", "best") is None


def test_a_version_says_what_it_was_trained_for(tmp_path):
    registry = Registry(tmp_path / "registry")
    tasks = {"a": "SEQ_CLS", "b": "CAUSAL_LM", "c": None, "d": "IMAGE_CLS"}
    made = {
        name: registry.register(name, make_adapter(tmp_path / name, task_type=task), lineage())
        for name, task in tasks.items()
    }
    assert [served_task(made[name]) for name in "abc"] == ["SEQ_CLS", "CAUSAL_LM", "CAUSAL_LM"]
    with pytest.raises(
        ServeError, match=r"^d@1: it was trained for IMAGE_CLS; endpoints answer for CAUSAL_LM, "
    ):
        served_task(made["d"])
    spec = resolved_yaml(classifier())
    trained = registry.register(
        "e", make_adapter(tmp_path / "e", task_type=None), replace(lineage(), resolved_spec=spec)
    )
    assert served_task(trained) == "SEQ_CLS"


def test_the_same_job_again_says_done_and_does_nothing(house):
    house.run(job())
    again = house.run(job())
    assert again.already and again.adapter == "docs@1" and again.endpoint.url.endswith("/tiny/v1")
    assert len(house.runner.requests) == 1 and "done: docs@1" in house.said()


def test_another_spec_under_the_name_is_refused_with_the_keys_and_the_ways_on(house):
    house.run(job())
    with pytest.raises(RunError, match=r"training\.learning_rate.*--new"):
        house.run(job(training={"learning_rate": 3e-4}))
    assert house.run(job(training={"learning_rate": 3e-4}), new=True).adapter == "docs@2"


def test_a_refused_adapter_is_registered_not_deployed_and_the_reason_is_said(house):
    house.runner.metrics["eval_loss"] = 3.0
    result = house.run(job())
    assert result.state == "registered, refused by the gate" and house.endpoints.deployed == []
    assert "fails" in " ".join(result.reasons) and "the gate refused it" in house.said()
    assert house.environment.registry.alias("docs", "production") is None


def test_force_deploys_against_the_gate(house):
    house.runner.metrics["eval_loss"] = 3.0
    assert house.run(job(), force=True).state == "done" and house.endpoints.deployed == ["docs@1"]


def test_without_deploy_it_is_only_registered(house):
    result = house.run(job(deploy=None))
    assert (result.state, house.endpoints.deployed) == ("done", [])
    assert house.environment.registry.get("docs@1").lineage.gate_passed is None


def test_a_version_that_is_watched_first_ends_the_job_and_says_how(house):
    house.endpoints.state, house.endpoints.rollout = "canary", "10 % of x@production by 'user', for 10m"
    result = house.run(job())
    assert result.state == "done" and result.endpoint.state == "canary"
    assert house.events[-1]["message"].endswith("/v1: 10 % of x@production by 'user', for 10m")
    assert house.environment.registry.alias(result.adapter.partition("@")[0], "production") is None
    assert house.run(job()).already


def test_no_room_for_the_endpoint_leaves_the_job_waiting_not_failed(house):
    house.endpoints.state = "waiting"
    assert house.run(job()).state == "registered, waiting to deploy"


def test_a_run_out_of_time_can_go_on(house):
    house.runner.error = OutOfTimeError(
        "retry.max_duration (1h) is over.", hint="Run the same command again."
    )
    with pytest.raises(OutOfTimeError):
        house.run(job())
    (record,) = house.environment.runs.list()
    assert record.state == "interrupted" and "retry.max_duration (1h) is over" in record.cause
    house.runner.error = None
    assert house.run(job()).state == "done"


@pytest.mark.parametrize("end", [SystemExit(9), TrainingError("gone.")])
def test_what_retry_allows_is_the_runs_and_not_its_drivers(house, end):
    """A driver dies, or a run fails: the next one has what is left, unless --resume asks for all of it."""
    failure = {"event": "failure", "attempt": 1, "rank": 1, "kind": "worker lost", "cause": "SIGKILL"}
    house.runner.more = [failure | {"will_retry": True}, failure | {"will_retry": False}]
    house.runner.error = end
    for _ in range(2):
        with pytest.raises(type(end)):
            house.run(job())
    spent = [request.spent for request in house.runner.requests]
    assert [each.retries for each in spent] == [{}, {"worker lost": 1}]
    assert 0 == spent[0].seconds < spent[1].seconds
    with pytest.raises(type(end)):
        house.run(job(), resume=True)
    assert house.runner.requests[-1].spent == Spent()
    (record,) = house.environment.runs.list()
    assert record.to_dict()["spent"]["retries"] == {"worker lost": 1}


def test_a_run_whose_time_is_over_starts_no_workers(house):
    limited = job(retry={"max_duration": 0.001})
    house.runner.error = TrainingError("gone.")
    with pytest.raises(TrainingError):
        house.run(limited)
    with pytest.raises(
        OutOfTimeError, match=r"has been under way for .* is over\. Run it again with --resume"
    ):
        house.run(limited)
    assert len(house.runner.requests) == 1
    house.runner.error = None
    assert house.run(limited, resume=True).state == "done"


def test_killed_between_registering_and_deploying_it_deploys_that_version(house):
    house.endpoints.error = KeyboardInterrupt()
    with pytest.raises(Interrupted):
        house.run(job())
    house.endpoints.error = None
    assert house.run(job()).adapter == "docs@1"
    assert len(house.runner.requests) == 1 and house.environment.registry.names() == ["docs"]
    assert [version.ref for version in house.environment.registry.versions("docs")] == ["docs@1"]


def test_killed_between_registering_and_saying_so_it_registers_no_second_one(house, monkeypatch):
    registry = house.environment.registry
    register = registry.register

    def register_and_die(*args, **kwargs):
        register(*args, **kwargs)
        raise SystemExit(9)

    monkeypatch.setattr(registry, "register", register_and_die)
    with pytest.raises(SystemExit):
        house.run(job())
    monkeypatch.undo()
    assert house.run(job()).adapter == "docs@1"
    assert [version.version for version in registry.versions("docs")] == [1]


def test_a_failure_keeps_its_cause_and_the_run_can_go_on(house):
    house.runner.error = TrainingError("the loss is NaN at step 7.", hint="Lower the learning rate.")
    with pytest.raises(TrainingError, match="NaN at step 7"):
        house.run(job())
    record = house.environment.runs.get("docs")
    assert record.state == "failed" and "NaN at step 7" in record.cause
    house.runner.error = None
    assert house.run(job()).state == "done"


def test_production_is_compared_with_and_its_training_rows_are_counted(house):
    gate = {"gate": {"all": ["eval_loss <= production.eval_loss"]}}
    first = house.run(job(deploy=gate))
    assert "no production version" in " ".join(first.reasons) and house.runner.requests[0].compare == {}
    house.runner.metrics |= {"eval_loss": 0.5, "production.eval_loss": 1.0}
    house.runner.eval_rows = ("11", "bb")
    second = house.run(job(deploy=gate, training={"seed": 7}), new=True)
    assert second.adapter == "docs@2" and second.state == "done"
    assert house.runner.requests[1].compare == {"production": house.environment.registry.get("docs@1").url}
    assert "1 of 2 evaluation rows were in the training rows of docs@1" in house.said()


def test_training_on_from_a_version_makes_it_the_parent(house):
    house.run(job())
    house.run(job(name="more", adapter={"init_from": "docs@1"}, register={"name": "docs"}))
    assert house.runner.requests[1].init_from == house.environment.registry.get("docs@1").url
    assert house.environment.registry.get("docs@2").lineage.parent == "docs@1"
    assert "evaluation rows were in the training rows" not in house.said()


def test_each_trial_of_a_sweep_trains_on_from_what_its_own_job_names(house):
    house.run(job())
    adapters = [{"type": "lora", "r": 8, "init_from": "docs@1"}, {"type": "lora", "r": 8}]
    spec = job(name="more", sweep={"space": {"adapter": {"choice": adapters}}}, register={"name": "docs"})
    best = trial_job(spec, {"adapter": adapters[0]})
    house.runner.spec = best
    house.run(spec)
    request, version = house.runner.requests[1], house.environment.registry.get("docs@1")
    runs = TrialRuns(request)
    assert [runs.group_request(trial_job(spec, {"adapter": each})).init_from for each in adapters] == [
        version.url,
        None,
    ]
    assert house.environment.registry.get("docs@2").lineage.parent == "docs@1"
    with pytest.raises(RegistryError, match=r"docs@9"):
        house.run(
            job(name="gone", sweep={"space": {"adapter.init_from": {"choice": ["docs@1", "docs@9"]}}}),
        )


def test_training_on_from_an_adapter_of_another_base_is_refused(house, tmp_path):
    from .adapters import lineage

    house.environment.registry.register("other", make_adapter(tmp_path / "other"), lineage())
    with pytest.raises(
        RegistryError, match=r"adapter.init_from: other@1 was trained on tiny, this job's base is"
    ):
        house.run(job(adapter={"init_from": "other@1"}))


def test_more_workers_than_there_ever_are_is_refused_before_a_run_is_made(house):
    with pytest.raises(PlacementError):
        house.run(job(resources={"num_workers": 64}))
    assert house.environment.runs.list() == []


def test_ctrl_c_while_training_has_the_workers_save_first(house):
    house.runner.waits = True
    stop = StopRequest()
    asker = threading.Thread(
        target=lambda: (_until(lambda: house.runner.requests), time.sleep(0.1), stop.ask())
    )
    asker.start()
    with pytest.raises(Interrupted):
        house.run(job(), stop=stop)
    asker.join()
    assert house.runner.stopped.is_set() and house.environment.runs.get("docs").state == "interrupted"


def test_ctrl_c_that_comes_too_late_for_the_workers_still_ends_the_command(house):
    """All steps were done when it came: nothing is registered or deployed behind the user's back."""
    stop = StopRequest()
    house.runner.stop = lambda: None
    emit = house.runner.events

    def events() -> Iterator[Event]:
        yield from emit()
        stop.ask()

    house.runner.events = events
    with pytest.raises(Interrupted):
        house.run(job(), stop=stop)
    assert house.environment.registry.names() == []
    house.runner.events = emit
    assert house.run(job()).adapter == "docs@1"


def test_ctrl_c_at_any_other_time_leaves_at_once():
    with pytest.raises(KeyboardInterrupt):
        StopRequest().ask()


def _until(condition, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_state_is_kept_once_and_in_order(house):
    house.run(job())
    states = [event["state"] for event in house.environment.runs.events("docs") if event["event"] == "state"]
    assert states == ["starting", "training", "gating", "registering", "registered", "deploying", "done"]
    assert [event["state"] for event in house.events if event["event"] == "state"] == states


def test_secrets_are_in_the_environment_only_while_private_files_are_read(house, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "orchestrator.service.jobs.data_hash", lambda spec: seen.append(os.environ["HF_TOKEN"]) or "0" * 64
    )
    monkeypatch.delenv("HF_TOKEN", raising=False)
    house.run(job(), secrets={"HF_TOKEN": "planted"})
    assert seen == ["planted"] and "HF_TOKEN" not in os.environ
    assert house.runner.requests[0].secrets == {"HF_TOKEN": "planted"}
    assert not [
        path
        for path in Path(house.environment.runs.url).rglob("*")
        if path.is_file() and b"planted" in path.read_bytes()
    ]


def test_a_result_that_another_process_printed_is_read_back():
    answers = Comparison("Why?", "a", "b", "curl")
    result = RunResult(
        "docs-1", "done", "docs@1", {"eval_loss": 1.0}, comparison=answers, wall_s=2.0, notes=("up",)
    )
    assert RunResult.from_dict(json.loads(json.dumps({"event": "result", **result.to_dict()}))) == result
