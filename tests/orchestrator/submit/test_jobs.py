"""Submitting against a dashboard that answers as it is told: what is refused before anything is sent, what is
sent, and what comes back."""

import json
import math
from importlib import metadata

import pytest

from orchestrator.cluster import ClusterFacts, NodeFacts, cluster_at
from orchestrator.errors import ClusterError, ModelError, PlacementError, RunError
from orchestrator.store import run_identity
from orchestrator.submit import jobs
from orchestrator.submit.envelope import close_envelope
from orchestrator.submit.payload import pack

from .job import make_job, write_inputs
from .stub import NODE, cluster, dashboard

RAY, PYTHON = metadata.version("ray"), jobs._python()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the job's inputs, and no token."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAYPEFT_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    write_inputs(tmp_path)
    return tmp_path


def record(id, status, run=None, **more):
    return {"submission_id": id, "status": status, "message": "m", "metadata": {"raypeft.run": run}, **more}


def refused(stub, error=ClusterError, **keys) -> str:
    with pytest.raises(error) as caught:
        jobs.submit(make_job(**keys), cluster_at(stub.url))
    assert not stub.sent("POST") and not stub.sent("PUT")  # nothing was sent
    return str(caught.value)


@pytest.mark.parametrize(
    ("ray", "python", "words"),
    [
        ("2.9.3", PYTHON, f"the cluster runs Ray 2.9.3 (here: {RAY}); a job needs the same on both sides."),
        (RAY, "3.9.18", f"the cluster runs Python 3.9.18 (here: {PYTHON}); a job"),
        (
            "2.9.3",
            "3.9.18",
            f"the cluster runs Ray 2.9.3 (here: {RAY}) and Python 3.9.18 (here: {PYTHON}); a job",
        ),
    ],
)
def test_other_versions_are_refused_with_both_numbers(folder, ray, python, words):
    with dashboard(cluster(ray, python)) as stub:
        said = refused(stub)
    assert words in said
    assert said.startswith(stub.url)


def test_the_same_minor_versions_are_taken():
    major, minor, _ = PYTHON.split(".")
    jobs.check_versions(
        ClusterFacts((NodeFacts(1),), 1, 0, ray_version=RAY, python_version=f"{major}.{minor}.99")
    )


def test_two_nodes_need_shared_storage(folder):
    with dashboard(cluster(RAY, PYTHON, NODE, NODE)) as stub:
        assert "the cluster has several nodes" in refused(stub)


def test_more_workers_than_there_can_ever_be_are_refused(folder):
    with dashboard(cluster(RAY, PYTHON)) as stub:
        said = refused(stub, PlacementError, resources={"num_workers": 64, "gpus_per_worker": 0})
    assert "64" in said


def test_a_sweep_is_refused_by_the_trial_that_the_cluster_can_never_give(folder):
    space = {"space": {"deepspeed": {"choice": ["zero2", "zero3"]}}}
    with dashboard(cluster(RAY, PYTHON)) as stub:
        said = refused(stub, PlacementError, resources={"num_workers": 64, "gpus_per_worker": 0}, sweep=space)
    assert "64" in said


def test_the_autoscalers_limits_count_where_only_the_cluster_knows_them():
    open_ended = ClusterFacts((NodeFacts(4, 1),), math.inf, math.inf, max_nodes=2)
    known = jobs.with_limits(open_ended, {"CPU": 64, "GPU": 8})
    assert (known.max_cpus, known.max_gpus) == (64, 8)
    assert jobs.with_limits(open_ended, {"CPU": 2}).max_gpus == 1  # what is there is there
    assert jobs.with_limits(open_ended, None) is open_ended


def test_a_base_that_does_not_exist_is_refused_here(folder):
    with dashboard(cluster(RAY, PYTHON)) as stub, pytest.raises(ModelError, match="does not exist"):
        jobs.submit(make_job("./nowhere"), cluster_at(stub.url))


def test_a_run_that_goes_on_is_not_started_twice(folder):
    run = jobs.run_id(make_job())
    with dashboard(cluster(RAY, PYTHON, **{"/api/jobs/": [record(f"{run}-1", "RUNNING", run)]})) as stub:
        said = refused(stub, RunError)
    assert f"run '{run}' is running there already, as job '{run}-1'." in said
    assert f"raypeft logs {run}-1 -f --address {stub.url}" in said


def test_the_id_is_the_runs_and_the_attempts(folder):
    run = jobs.run_id(make_job())
    assert run == f"small-{run_identity(jobs.canonical_hash(make_job()), jobs.data_hash(make_job()))[:8]}"
    known = [jobs._state(record(f"{run}-{number}", "FAILED", run)) for number in (1, 2, 10)]
    assert jobs._next_attempt(known, run) == 11
    assert jobs._next_attempt([], run) == 1


def test_data_outside_the_working_directory_is_sent_from_where_it_is(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_inputs(elsewhere)
    spec = make_job(data=str(elsewhere / "rows.jsonl"))
    said = json.loads(jobs.describe(spec, cluster_at("http://head:8265")))
    assert "files/1/rows.jsonl" in said["spec"]
    sent = pack(spec, cluster_at("http://head:8265")).spec
    (folder / "files" / "1").mkdir(parents=True)
    (folder / "files" / "1" / "rows.jsonl").write_bytes((elsewhere / "rows.jsonl").read_bytes())
    assert said["body"]["metadata"]["raypeft.run"] == jobs.run_id(sent)  # what the cluster makes of it


def request(arguments=(), **keywords):
    packed = pack(make_job(), cluster_at("http://head:8265"))
    return jobs.run_request(packed.zip(), "small-12345678", 2, arguments=arguments, **keywords)


def test_the_request_names_code_files_and_command(folder):
    sent = request(["--resume"])
    body = sent.body()
    assert body["submission_id"] == "small-12345678-2"
    assert body["entrypoint"] == "exec sh start.sh -m orchestrator run job.yaml --json --resume"
    environment = body["runtime_env"]
    packages = {f"gcs://{name}" for name in sent.packages}
    assert {environment["working_dir"], *environment["py_modules"]} == packages
    assert environment["env_vars"]["RAYPEFT_CLUSTER"] == "cluster.yaml"
    assert environment["env_vars"]["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) < 30
    assert "pip" not in environment


def test_what_lacks_is_installed_where_asked(folder):
    environment = request(pip=["deepspeed>=0.19"]).body()["runtime_env"]
    assert environment["pip"]["packages"] == ["deepspeed>=0.19"]
    assert environment["env_vars"]["RAYPEFT_INSTALLED"] == "1"


def test_a_secret_is_in_nothing_that_is_listed(folder):
    envelope = close_envelope({"HF_TOKEN": "planted-value"})
    sent = request(envelope=envelope)
    assert "planted" not in json.dumps(sent.body()) + repr(sent)
    assert sent.body()["entrypoint"].startswith("exec sh start.sh -m orchestrator.submit.bootstrap run")
    assert all(b"planted" not in content for content in sent.packages.values())


def test_a_dry_run_shows_all_and_sends_nothing(folder):
    shown = json.loads(jobs.describe(make_job(secrets={"HF_TOKEN": "env"}), cluster_at("http://head:8265")))
    assert shown["POST"] == "http://head:8265/api/jobs/"
    assert shown["body"]["submission_id"].endswith("-1")
    assert shown["local_files"] == {"base": 23, "rows.jsonl": (folder / "rows.jsonl").stat().st_size}
    assert "name: small" in shown["spec"]


LACKING = {
    "python": PYTHON,
    "ray": RAY,
    "executable": "/usr/bin/python3",
    "nodes": 1,
    "max": None,
    "missing": [
        {"requirement": "deepspeed>=0.19", "installed": None},
        {"requirement": "transformers<6,>=5.20", "installed": "4.30.0"},
    ],
}


def checked(stub, monkeypatch, log):
    """A dashboard whose check job has ended and printed `log`."""
    monkeypatch.setattr(jobs.random, "token_hex", lambda size: "id")
    stub.answers |= {
        "POST /api/jobs/": {"submission_id": "raypeft-check-id"},
        "/api/jobs/raypeft-check-id": record("raypeft-check-id", "SUCCEEDED"),
        "/api/jobs/raypeft-check-id/logs": {"logs": log},
    }
    known = set()

    class Store(jobs.Dashboard):
        def has_package(self, name):
            return name in known

        def put_package(self, name, content):
            known.add(name)

    return Store(stub.url)


def test_all_that_an_environment_lacks_is_named_in_one_message(folder, monkeypatch):
    with dashboard(cluster(RAY, PYTHON)) as stub:
        store = checked(stub, monkeypatch, f"noise\n{jobs.MARK} {json.dumps(LACKING)}\n")
        found = jobs.ask_environment(store)
        with pytest.raises(ClusterError) as caught:
            jobs.to_install(found, stub.url, install=False)
        assert jobs.to_install(found, stub.url, install=True) == ["deepspeed>=0.19", "transformers<6,>=5.20"]
    assert str(caught.value) == (
        f"{stub.url}: the cluster's environment (/usr/bin/python3) lacks deepspeed>=0.19, "
        "transformers<6,>=5.20 (4.30.0 is installed). Install them there, or have them installed with each "
        "job: install: true in the cluster file, or raypeft submit --install."
    )


def test_a_check_that_fails_says_why(folder, monkeypatch):
    with dashboard(cluster(RAY, PYTHON)) as stub:
        store = checked(stub, monkeypatch, "Traceback\nModuleNotFoundError: No module named 'ray'\n")
        with pytest.raises(
            ClusterError, match="check of the cluster's environment failed: ModuleNotFoundError"
        ):
            jobs.ask_environment(store)


def test_jobs_are_listed_newest_first_without_our_checks():
    listed = [
        record("a-1", "FAILED", start_time=1000),
        record("raypeft-check-1", "SUCCEEDED", start_time=1500, end_time=2000),
        record("b-1", "RUNNING", start_time=3000),
        {"submission_id": None, "type": "DRIVER", "status": "RUNNING"},
    ]
    with dashboard({"/api/jobs/": listed, "DELETE /api/jobs/raypeft-check-1": {}}) as stub:
        found = jobs.list_jobs(stub.url)
    assert [job.id for job in found] == ["b-1", "a-1"]
    assert found[0].start_time == 3.0
    assert [path for path, _ in stub.sent("DELETE")] == ["/api/jobs/raypeft-check-1"]  # it ended long ago


def test_what_is_no_dashboard_has_no_jobs():
    with dashboard({}) as stub:
        for ask in (jobs.list_jobs, lambda address: jobs.status("a", address)):
            with pytest.raises(ClusterError, match="it is not the dashboard of a Ray that we know"):
                ask(stub.url)


def test_an_unknown_job_is_said_with_the_closest():
    with dashboard({"/api/jobs/": [record("small-12345678-1", "RUNNING")]}) as stub:
        for ask in (jobs.status, jobs.cancel, lambda *job: list(jobs.logs(*job))):
            with pytest.raises(RunError) as caught:
                ask("small-12345678-2", stub.url)
            assert str(caught.value) == (
                f"{stub.url}: the cluster has no job 'small-12345678-2'. Closest: 'small-12345678-1'."
            )


def test_logs_come_once_each_and_end_with_the_job(monkeypatch):
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    with dashboard({"/api/jobs/a": record("a", "RUNNING"), "/api/jobs/a/logs": {"logs": "one\n"}}) as stub:
        following = jobs.logs("a", stub.url, follow=True)
        assert next(following) == "one\n"
        stub.answers["/api/jobs/a/logs"] = {"logs": "one\ntwo\n"}
        assert next(following) == "two\n"
        stub.answers["/api/jobs/a"] = record("a", "SUCCEEDED")
        stub.answers["/api/jobs/a/logs"] = {"logs": "one\ntwo\nthree\n"}
        assert list(following) == ["three\n"]
        assert "".join(jobs.logs("a", stub.url)) == "one\ntwo\nthree\n"


def test_cancel_returns_when_the_job_has_gone(monkeypatch):
    with dashboard(
        {"/api/jobs/a": record("a", "RUNNING"), "POST /api/jobs/a/stop": {"stopped": True}}
    ) as stub:
        monkeypatch.setattr(
            jobs.time, "sleep", lambda seconds: stub.answers.update({"/api/jobs/a": record("a", "STOPPED")})
        )
        assert jobs.cancel("a", stub.url).status == "STOPPED"
        assert stub.sent("POST") == [("/api/jobs/a/stop", b"")]
        assert jobs.cancel("a", stub.url).status == "STOPPED"  # again: it has ended, nothing more is sent
        assert len(stub.sent("POST")) == 1
