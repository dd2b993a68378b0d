"""What a job's `tracking` section asks for, what is refused before anything starts, and where people then look."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cluster import ClusterFacts, NodeFacts, cluster_at, load_cluster
from orchestrator.errors import SpecError
from orchestrator.spec.canonical import canonical_hash, keys_that_bar_resume, resolved_values
from orchestrator.spec.schema import json_schema
from orchestrator.tracking.session import Tracking
from orchestrator.tracking.targets import check_tracking, open_tracking, targets, untold, where_to_look
from tests.orchestrator.spec.jobs import refused_after_minimal, spec_of

ONE = ClusterFacts((NodeFacts(4),), 4, 0)
TWO = ClusterFacts((NodeFacts(4), NodeFacts(4)), 8, 0, max_nodes=2)


@pytest.fixture(autouse=True)
def turned_on(monkeypatch):
    monkeypatch.delenv("RAYPEFT_TRACKING")


def local():
    return load_cluster("local")


def kinds(text: str = "") -> list[str]:
    return [target["kind"] for target in targets(spec_of(text), local())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["mlflow"]),
        ("tracking: {mlflow: false}", []),
        ("tracking: {mlflow: null}", []),
        ("tracking: {tensorboard: true}", ["mlflow", "tensorboard"]),
        ("tracking: {mlflow: false, wandb: {project: p}}", ["wandb"]),
        ("report_to: [tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("report_to: none", []),
        ("report_to: all", ["mlflow", "tensorboard", "wandb"]),
        ("use_mlflow: false\nuse_tensorboard: true", ["tensorboard"]),
    ],
)
def test_who_is_told(text, expected):
    assert kinds(text) == expected


def test_one_switch_turns_all_off(monkeypatch):
    monkeypatch.setenv("RAYPEFT_TRACKING", "off")
    assert kinds("tracking: {tensorboard: true, wandb: true}") == []


def test_the_default_is_a_database_file_beside_the_runs(session_home, tmp_path):
    (mlflow,) = targets(spec_of(), local())
    assert mlflow["uri"] == f"sqlite:///{session_home}/mlflow.db" and mlflow["experiment"] == "x"
    assert mlflow["artifacts"] == (session_home / "mlflow-artifacts").as_uri()
    (beside,) = targets(spec_of(), local(), storage=str(tmp_path))
    assert beside["uri"] == f"sqlite:///{tmp_path}/mlflow.db"


def test_each_key_does_something(tmp_path):
    text = (
        "tracking: {mlflow: {uri: 'http://m:5000', experiment: e}, tensorboard: {dir: boards},"
        " wandb: {project: p, entity: us, mode: offline, dir: w}}"
    )
    mlflow, tensorboard, wandb = targets(spec_of(text), local())
    assert (mlflow["uri"], mlflow["experiment"], mlflow["artifacts"]) == ("http://m:5000", "e", None)
    assert tensorboard["folder"] == str(Path("boards").absolute())
    assert (wandb["project"], wandb["entity"], wandb["mode"], wandb["folder"]) == (
        "p", "us", "offline", str(Path("w").absolute()),
    )  # fmt: skip


def test_object_storage_holds_no_database_and_says_so():
    spec = spec_of()
    assert targets(spec, local(), storage="s3://bucket/runs") == []
    assert "a database file cannot live in object storage" in untold(
        spec, local(), storage="s3://bucket/runs"
    )
    assert untold(spec, local()) is None
    server = spec_of("tracking: {mlflow: {uri: 'http://m:5000'}}")
    assert untold(server, local(), storage="s3://bucket/runs") is None
    assert untold(spec_of("tracking: {mlflow: false}"), local(), storage="s3://bucket/runs") is None


def test_a_relative_database_is_refused_on_several_nodes():
    spec = spec_of("tracking: {mlflow: {uri: 'sqlite:///runs.db'}}")
    check_tracking(spec, local(), ONE)
    (target,) = targets(spec, local())
    assert target["uri"] == f"sqlite:///{Path('runs.db').absolute()}"
    for cluster, facts in ((local(), TWO), (replace(cluster_at("http://h:8265"), address="auto"), ONE)):
        with pytest.raises(
            SpecError, match=r"tracking\.mlflow\.uri: 'sqlite:///runs\.db' is a relative file"
        ) as raised:
            check_tracking(spec, cluster, facts)
        assert "sqlite:////absolute/file.db" in str(raised.value)
    check_tracking(spec_of("tracking: {mlflow: {uri: 'sqlite:////a/runs.db'}}"), local(), TWO)


def test_a_uri_that_is_none_is_refused():
    with pytest.raises(SpecError, match="is no database's URI"):
        check_tracking(spec_of("tracking: {mlflow: {uri: 'sqlite:runs.db'}}"), local(), ONE)


def test_a_package_that_is_not_there_is_asked_for(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest)
    )
    with pytest.raises(SpecError, match=r"tracking\.wandb: the package wandb is not installed") as raised:
        check_tracking(spec_of("tracking: {wandb: true}"), local(), ONE)
    assert 'pip install "raypeft[wandb]"' in str(raised.value)
    check_tracking(spec_of(), local(), ONE)
    check_tracking(spec_of("tracking: {wandb: true}"), cluster_at("http://h:8265"), ONE)


def test_where_to_look():
    text = (
        "tracking: {mlflow: {uri: 'http://me:secret@m:5000'}, tensorboard: {dir: /t},"
        " wandb: {mode: offline, dir: /w}}"
    )
    lines = list(where_to_look(Tracking(targets(spec_of(text), local())), "x-1"))
    assert lines == [
        "MLflow: run 'x-1' of experiment 'x': http://m:5000",
        "TensorBoard: run 'x-1': tensorboard --logdir /t",
        "W&B: run 'x-1' waits for: wandb sync /w/wandb/offline-run-*",
    ]
    online = Tracking(targets(spec_of("tracking: {mlflow: false, wandb: {entity: us}}"), local()))
    assert list(where_to_look(online, "x-1")) == ["W&B: run 'x-1' of project us/x: https://wandb.ai"]
    default = Tracking(targets(spec_of(), local()))
    assert "mlflow ui --backend-store-uri sqlite:///" in next(where_to_look(default, "x-1"))


def test_trackers_get_their_own_secrets_and_no_other():
    tracking = open_tracking(
        spec_of(), local(), {"MLFLOW_TRACKING_TOKEN": "a", "WANDB_API_KEY": "b", "HF_TOKEN": "c"}
    )
    env = tracking.env
    assert env["MLFLOW_TRACKING_TOKEN"] == "a" and env["WANDB_API_KEY"] == "b"
    assert env.get("HF_TOKEN") != "c"


def test_it_is_no_part_of_what_a_run_is():
    before, after = spec_of(), spec_of("tracking: {tensorboard: true}")
    assert canonical_hash(spec_of("tracking: {mlflow: true}")) == canonical_hash(before)
    assert keys_that_bar_resume(before, after) == []
    assert resolved_values(before)["tracking"]["mlflow"] == {"uri": None, "experiment": None}


def test_the_schema_takes_a_switch():
    trackers = json_schema()["$defs"]["TrackingSpec"]["properties"]
    assert all({"type": "boolean"} in each["anyOf"] for each in trackers.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tracking: {mlfow: true}", "jobs/x.yaml:3 tracking.mlfow: no such key. Closest: 'tracking.mlflow'."),
        ("tracking: {wandb: {mode: off}}",
         "jobs/x.yaml:3 tracking.wandb.mode: 'off' is not one of online, offline. Closest: 'offline'."),
        ("report_to: comet",
         "jobs/x.yaml:3 report_to: 'comet' has no counterpart. Write any of mlflow, tensorboard, wandb, or none."),
    ],
)  # fmt: skip
def test_mistakes_are_named(text, message):
    assert refused_after_minimal(text + "\n") == message
