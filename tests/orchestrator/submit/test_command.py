"""`deploy`, `undeploy` and `endpoints` on a cluster that takes jobs only, against a dashboard that answers as it
is told: what is sent, and that events, results and errors are as if the command had run here."""

import io
import json
import shlex
import zipfile
from importlib import metadata

import pytest

from orchestrator import api, wiring
from orchestrator.api import served
from orchestrator.cli import app, run_guarded
from orchestrator.cluster import load_cluster
from orchestrator.errors import ClusterError, ModelError, RaypeftError, ServeError, rebuilt
from orchestrator.registry import Registry
from orchestrator.serve.desired import Desired, Served
from orchestrator.submit import command, jobs

from ..adapters import BASE, lineage, make_adapter
from .stub import cluster, dashboard

RAY, PYTHON = metadata.version("ray"), jobs._python()
ENVIRONMENT = {"python": PYTHON, "ray": RAY, "executable": "python", "missing": [], "nodes": 1, "max": None}
STATE = {"event": "state", "state": "deploying", "message": "endpoint tiny: starting a replica"}
MADE = {
    "endpoint": "tiny", "url": "http://127.0.0.1:8000/tiny/v1", "model": "docs@1", "base_name": "tiny",
    "state": "live", "rollout": None,
}  # fmt: skip


class Site:
    """A cluster file `there.yaml` with a folder for a registry, and what the cluster's job shall print."""

    def __init__(self, stub, folder):
        self.stub, self.folder = stub, folder
        self.registry = Registry(folder / "registry")
        self.write_cluster("address")
        self.log, self.status = "", "SUCCEEDED"
        stub.answers |= {
            "/api/packages/gcs/*": {},
            "POST /api/jobs/": lambda body: {"submission_id": json.loads(body)["submission_id"]},
            "POST /api/jobs/*": {"stopped": True},
            "/api/jobs/raypeft-check-id": {"submission_id": "raypeft-check-id", "status": "SUCCEEDED"},
            "/api/jobs/raypeft-check-id/logs": {"logs": f"{jobs.MARK} {json.dumps(ENVIRONMENT)}\n"},
        }
        for name in ("deploy", "undeploy"):
            id = f"raypeft-{name}-id"
            stub.answers[f"/api/jobs/{id}"] = lambda body, id=id: {
                "submission_id": id, "status": self.status, "message": "m"
            }  # fmt: skip
            stub.answers[f"/api/jobs/{id}/logs"] = lambda body: {"logs": self.log}

    def write_cluster(self, kind, **more):
        (self.folder / "ray.yaml").write_text("")
        needed = {"launcher": {"launcher": "ray.yaml"}, "kuberay": {"manifest": "ray.yaml"}}.get(kind, {})
        places = {"storage": str(self.folder / "runs"), "registry": self.registry.url}
        serve = {"host": "127.0.0.1", "port": 1}
        keys = {"kind": kind, "address": self.stub.url, **needed, **places, "serve": serve, **more}
        kept = {key: value for key, value in keys.items() if value is not None}
        (self.folder / "there.yaml").write_text(json.dumps(kept))

    def register(self):
        return self.registry.register("docs", make_adapter(self.folder / "adapter"), lineage())

    def entrypoints(self):
        posted = [json.loads(body) for path, body in self.stub.sent("POST") if path == "/api/jobs/"]
        return [body["entrypoint"] for body in posted if not body["submission_id"].startswith(jobs.CHECK)]


def printed(*values):
    return "noise of Ray's\n" + "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RAYPEFT_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jobs.random, "token_hex", lambda size: "id")
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    with dashboard(cluster(RAY, PYTHON)) as stub:
        yield Site(stub, tmp_path)


@pytest.mark.parametrize("kind", ["address", "launcher", "kuberay"])
def test_deploy_is_a_job_there_and_its_events_and_result_come_back(site, kind):
    site.write_cluster(kind)
    site.register()
    site.log = printed(STATE, {"event": "result", **MADE})
    events = []
    made = api.deploy("docs@1", cluster="there.yaml", on_event=events.append)
    assert made.to_dict() == MADE
    assert events == [STATE]
    assert site.entrypoints() == ["exec sh start.sh -m orchestrator deploy docs@1 --alias=production --json"]


def test_what_was_asked_travels_and_an_alias_is_resolved_here(site):
    site.registry.set_alias("docs", site.register().version, "candidate")
    site.log = printed({"event": "result", **MADE})
    api.deploy(
        "docs@candidate", endpoint="mine", alias="best", num_replicas=2, force=True, cluster="there.yaml"
    )
    assert site.entrypoints() == [
        "exec sh start.sh -m orchestrator deploy docs@1 --alias=best --endpoint=mine --replicas=2 --force --json"
    ]


def test_what_was_set_travels_too(site):
    site.register()
    site.log = printed({"event": "result", **MADE})
    settings = [
        "cpus_per_replica=2",
        "rollout.bake=10m",
        "rollout.rollback={any: [error_rate > 0.1]}",
        "engine.max_adapters=3",
    ]
    api.deploy("docs@1", settings=settings, cluster="there.yaml")
    (line,) = site.entrypoints()
    words = shlex.split(line)
    sent = [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    assert sent == [
        "cpus_per_replica=2.0",
        "rollout.bake=600.0",
        'rollout.rollback={"any": ["error_rate > 0.1"]}',
        "engine.max_adapters=3",
    ]
    assert served.deploy_spec(sent).rollout == served.deploy_spec(settings).rollout  # read there as here


def test_the_job_has_the_wheel_and_the_clusters_places(site):
    site.register()
    site.log = printed({"event": "result", **MADE})
    sent = {}
    known = jobs.Dashboard.has_package
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.Dashboard, "has_package", lambda self, name: name in sent and known(self, name))
        put = jobs.Dashboard.put_package
        patch.setattr(
            jobs.Dashboard,
            "put_package",
            lambda self, name, content: (sent.update({name: content}), put(self, name, content)),
        )
        api.deploy("docs@1", cluster="there.yaml")
    body = json.loads([body for path, body in site.stub.sent("POST") if path == "/api/jobs/"][-1])
    assert body["submission_id"] == "raypeft-deploy-id" and "raypeft.run" not in body["metadata"]
    environment = body["runtime_env"]
    assert environment["env_vars"]["RAYPEFT_CLUSTER"] == "cluster.yaml"
    content = {
        name: zipfile.ZipFile(io.BytesIO(sent[url.removeprefix("gcs://")]))
        for name, url in (("code", environment["py_modules"][0]), ("folder", environment["working_dir"]))
    }
    assert "orchestrator/__main__.py" in content["code"].namelist()
    inside = content["folder"].read("cluster.yaml").decode()
    assert "address: auto" in inside and f'registry: "{site.registry.url}"' in inside


@pytest.mark.parametrize("error", [ServeError, ModelError, ClusterError])
def test_an_error_there_is_the_same_error_here(site, error):
    site.register()
    original = error("it does not fit.", where="docs@1", hint="Do this.")
    site.log, site.status = printed(STATE, {"error": original.to_dict()}) + f"error: {original}\n", "FAILED"
    with pytest.raises(RaypeftError) as caught:
        api.deploy("docs@1", cluster="there.yaml")
    assert type(caught.value) is error and str(caught.value) == str(original)


def test_every_error_can_be_rebuilt():
    for cls in RaypeftError.__subclasses__():
        if cls.__module__ != "orchestrator.errors":
            continue
        error = cls("p.", where="w", hint="h")
        again = rebuilt(json.loads(json.dumps(error.to_dict())))
        assert (type(again), str(again), again.exit_code) == (cls, str(error), cls.exit_code)
    assert type(rebuilt({"code": "of a later version", "message": "p."})) is RaypeftError


def test_a_job_that_ends_without_a_word_of_ours_is_said(site):
    site.register()
    site.log, site.status = "Traceback\nImportError: no module named torch\n", "FAILED"
    with pytest.raises(ClusterError) as caught:
        api.deploy("docs@1", cluster="there.yaml")
    assert str(caught.value) == (
        f"{site.stub.url}: `raypeft deploy docs@1 --alias=production` ended there without a result (FAILED): "
        f"ImportError: no module named torch. Its log: raypeft logs raypeft-deploy-id --address {site.stub.url}"
    )


def test_the_command_line_shows_progress_beside_the_result(site, capsys):
    site.register()
    site.log = printed(STATE, {"event": "result", **MADE})
    assert run_guarded(app, ["deploy", "docs@1", "--cluster", "there.yaml"]) == 0
    told = capsys.readouterr()
    assert told.out == "live: docs@1 at http://127.0.0.1:8000/tiny/v1\n" and STATE["message"] in told.err
    assert run_guarded(app, ["deploy", "docs@1", "--cluster", "there.yaml", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == {"event": "result", **MADE}
    assert json.loads(told.err) == STATE
    site.log, site.status = printed({"error": ServeError("no.").to_dict()}), "FAILED"
    assert run_guarded(app, ["deploy", "docs@1", "--cluster", "there.yaml", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"error": ServeError("no.").to_dict()}


def test_undeploy_is_a_job_there(site):
    site.log = printed({"event": "result", "undeployed": "tiny"})
    site.register()
    api.undeploy("tiny", cluster="there.yaml")
    served = Desired("tiny", BASE).with_adapter(Served("docs", 1))
    for name in ("tiny", "other"):
        site.registry.update_endpoint(name, lambda now: served.to_dict())
    api.undeploy("docs@1", cluster="there.yaml")
    start = "exec sh start.sh -m orchestrator undeploy"
    assert site.entrypoints() == [
        f"{start} tiny --json",
        f"{start} docs@1 --endpoint=other --json",
        f"{start} docs@1 --endpoint=tiny --json",
    ]
    with pytest.raises(ServeError, match="no endpoint serves 'docs@7'"):
        api.undeploy("docs@7", cluster="there.yaml")


def test_endpoints_are_read_from_the_registry_and_over_http(site):
    site.registry.update_endpoint("tiny", lambda now: Desired("tiny", BASE).to_dict())
    (row,) = api.endpoints(cluster="there.yaml")
    assert (row.name, row.state, row.base) == ("tiny", "down", "tiny")
    assert site.entrypoints() == []


def test_a_registry_that_only_one_side_knows_is_refused_before_anything_is_sent(site):
    for keys in ({"storage": None}, {"registry": None}):
        site.write_cluster("address", **keys)
        for ask in (
            lambda: api.deploy("docs@1", cluster="there.yaml"),
            lambda: api.undeploy("docs@1", cluster="there.yaml"),
            lambda: api.endpoints(cluster="there.yaml"),
        ):
            with pytest.raises(ClusterError) as caught:
                ask()
            assert str(caught.value) == (
                f"{site.folder / 'there.yaml'}: nothing names a registry that both this machine and the cluster "
                "'there' see, so what is registered here cannot be served there. Name storage: s3://BUCKET/runs "
                "and registry: s3://BUCKET/adapters in a cluster file, or folders that the nodes and this "
                "machine mount, and say --cluster FILE."
            )
    with pytest.raises(ClusterError, match="nothing names a registry that both"):
        api.endpoints(cluster=site.stub.url)
    assert site.stub.requests == []


def test_a_registry_folder_that_is_not_mounted_here_is_said(site):
    with pytest.raises(ClusterError) as caught:
        api.undeploy("tiny", cluster="there.yaml")
    assert f"the registry '{site.registry.url}' is no folder of this machine. Mount it here" in str(
        caught.value
    )
    assert site.stub.requests == []


def test_without_an_address_it_is_said_how_to_get_one(site):
    site.register()
    site.write_cluster("launcher", address=None)
    with pytest.raises(ClusterError, match=r"write address: http://127.0.0.1:8265 into the cluster file"):
        api.deploy("docs@1", cluster="there.yaml")


def test_what_the_environment_lacks_is_named_before_the_command_runs(site):
    site.register()
    missing = [{"requirement": "torch>=2", "installed": None}]
    said = f"{jobs.MARK} {json.dumps({**ENVIRONMENT, 'missing': missing})}\n"
    site.stub.answers["/api/jobs/raypeft-check-id/logs"] = {"logs": said}
    with pytest.raises(ClusterError, match=r"lacks torch>=2"):
        api.deploy("docs@1", cluster="there.yaml")
    assert site.entrypoints() == []
    site.write_cluster("address", install=True)
    site.log = printed({"event": "result", **MADE})
    api.deploy("docs@1", cluster="there.yaml")
    body = json.loads([body for path, body in site.stub.sent("POST") if path == "/api/jobs/"][-1])
    assert body["runtime_env"]["pip"]["packages"] == ["torch>=2"]


def test_ctrl_c_stops_the_job_there(site):
    site.register()
    site.log, site.status = printed(STATE), "RUNNING"

    def interrupt(event):
        site.status = "STOPPED"
        raise KeyboardInterrupt

    stops = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "cancel", lambda id, address: stops.append((id, address)))
        with pytest.raises(KeyboardInterrupt):
            api.deploy("docs@1", cluster="there.yaml", on_event=interrupt)
    assert stops == [("raypeft-deploy-id", site.stub.url)]


def test_lines_are_read_however_they_are_cut():
    text = printed(STATE, STATE, {"event": "result", **MADE}) + '{"a": 1}\n{"torn'
    for size in (1, 7, 1000):
        events = []
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        result, error, last = command.read_output(pieces, events.append)
        assert (events, result["url"], error, last) == ([STATE, STATE], MADE["url"], None, '{"torn')


def test_run_still_points_to_submit(site):
    with pytest.raises(ClusterError) as caught:
        wiring.connect(load_cluster("there.yaml"))
    assert "raypeft submit FILE --cluster" in str(caught.value) and "--follow" in str(caught.value)
    assert site.stub.requests == []
