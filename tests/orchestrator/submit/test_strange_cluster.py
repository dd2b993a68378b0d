"""A real Ray cluster whose environment has never heard of raypeft, with token authentication.

Its Python is a virtual environment of its own that sees the installed packages of this one (a `.pth` file
names their folder) but not raypeft: an editable install is found through a `.pth` file of its own, and such
files count only in an environment's own folder. A raypeft that is installed as a copy is hidden by the first
entry of `.pth`, a finder that refuses it. What a job imports of it came with the job.

The jobs run the real command where that is what is tested, and a stand-in `orchestrator/__main__.py` inside
the real wheel where only the way there and back is.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest

from orchestrator import api, keeper, local_ray
from orchestrator.cluster import cluster_at
from orchestrator.errors import ClusterError, ModelError, ServeError
from orchestrator.registry import Registry
from orchestrator.submit import jobs, wheel
from orchestrator.submit.dashboard import Dashboard
from orchestrator.submit.payload import UPLOAD_LIMIT_BYTES
from tests.patience import patience

from ..serve import tiny
from .job import make_job, write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # one Ray for all, 10 s; each job 5 to 10 s

PLANTED = "planted-" + secrets.token_hex(12)
TOKEN = secrets.token_hex(32)

STAND_IN = """
import importlib.util, json, os, signal, sys, time
import orchestrator, ray
from orchestrator.cluster import load_cluster
from orchestrator.processes import hear_interrupts
hear_interrupts()  # as the real one does
ray.init(address="auto", log_to_driver=False)

@ray.remote
def elsewhere():
    import importlib.util, orchestrator
    return orchestrator.__file__, importlib.util.find_spec("raypeft_absent") is not None

there, has_absent = ray.get(elsewhere.remote())
print(json.dumps({
    "arguments": sys.argv[1:], "python": sys.executable, "here": orchestrator.__file__,
    "there": there, "files": sorted(os.listdir(".")),
    "secret": os.environ.get("HF_TOKEN", "")[::-1], "cluster": load_cluster().address,
    "absent": [importlib.util.find_spec("raypeft_absent") is not None, has_absent],
}), flush=True)
if "--wait" in sys.argv:
    held = ray.util.placement_group([{"CPU": 1}])
    ray.get(held.ready())
    @ray.remote(num_cpus=0)
    class Worker:
        def pid(self): return os.getpid()
    worker = Worker.remote()
    pids = os.getpid(), ray.get(worker.pid.remote())
    try:
        print("PIDS", *pids, flush=True)
        time.sleep(600)
    except (KeyboardInterrupt, SystemExit):   # Ray makes the second of a SIGTERM
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        time.sleep(4)   # longer than the 3 s after which Ray would kill it by default
        print("saved a checkpoint", flush=True)
        sys.exit(130)
"""


HIDE = """
import sys
from importlib.machinery import PathFinder

class OnlyWhatWasSent:
    def find_spec(self, name, path=None, target=None):
        if name not in ("orchestrator", "peft_dist"):
            return None
        found = PathFinder.find_spec(name, [folder for folder in sys.path if "_ray_pkg_" in folder])
        if found is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found

sys.meta_path.insert(0, OnlyWhatWasSent())
"""


def strange_environment(folder: Path) -> Path:
    """A virtual environment as described above; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (own / "hide_raypeft.py").write_text(HIDE)
    (own / "environment.pth").write_text(f"import hide_raypeft\n{sysconfig.get_path('purelib')}\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def head(home):
    """The address of its dashboard, and the folder with everything that it writes."""
    python = strange_environment(home / "environment")
    refused = subprocess.run([python, "-c", "import orchestrator"], capture_output=True, text=True)
    assert "ModuleNotFoundError" in refused.stderr  # the point of it all
    mark = secrets.token_hex(4)
    folder = Path(f"/tmp/r{mark}")  # Ray's sockets need a short path
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("RAY", "VIRTUAL_ENV"))
    } | {
        "PATH": "/usr/bin:/bin", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, keeper.MARKER: mark,
        "RAY_USAGE_STATS_ENABLED": "0", "RAYPEFT_HOME": str(home / "raypeft"), **local_ray.LOOPBACK_ONLY,
    }  # fmt: skip
    command = [
        str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", "--port=0",
        "--dashboard-host=127.0.0.1", "--dashboard-port=0", f"--temp-dir={folder}",
        "--ray-client-server-port=23999", "--node-ip-address=127.0.0.1",
        "--object-store-memory=100000000", "--dashboard-agent-listen-port=0",
    ]  # fmt: skip
    log = home / "log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, cwd=home, start_new_session=True,
            # As below a shell's background job: this Ray ignores what it ends jobs by, and so does all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )  # fmt: skip
    try:
        wait_until(lambda: "RAY_API_SERVER_ADDRESS" in log.read_text() or process.poll() is not None)
        address = log.read_text().partition("RAY_API_SERVER_ADDRESS='")[2].partition("'")[0]
        assert address, log.read_text()
        yield address, folder
    finally:
        keeper.end(lambda: keeper.marked(mark))
        process.wait(10)
        subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture(autouse=True)
def job_folder(tmp_path, monkeypatch):
    """The submitting side: the job's inputs in its working directory, and the cluster's token."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local_ray, "_set_aside", {})
    for name in ("RAYPEFT_CLUSTER", "RAY_AUTH_TOKEN_PATH", local_ray.ATTACHED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.fixture
def stand_in(monkeypatch):
    """The real wheel with another `python -m orchestrator`; a short list of what it needs."""
    files = wheel._files

    def with_stand_in(package):
        more = {"orchestrator/__main__.py": STAND_IN.encode()} if package == "orchestrator" else {}
        return files(package) | more

    monkeypatch.setattr(wheel, "_files", with_stand_in)
    monkeypatch.setattr(jobs, "requirements", lambda: ["ray[default]>=2", "pydantic>=2"])


def wait_until(condition, timeout_s=60.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < patience(timeout_s)
        time.sleep(0.1)


def log_of(job):
    return "".join(jobs.logs(job.id, job.address, follow=True))


def told(log):
    return json.loads(next(line for line in log.splitlines() if line.startswith('{"arguments"')))


def everything_that_a_dashboard_shows(address):
    """Every page of JSON that the dashboard's own front end reads, and Ray's `get_job_info`."""
    pages = [
        "/api/jobs/", "/api/v0/jobs", "/api/v0/runtime_envs", "/api/v0/actors?detail=1",
        "/api/v0/tasks?detail=1", "/api/v0/workers?detail=1", "/api/v0/nodes?detail=1",
        "/nodes?view=summary", "/nodes?view=details", "/api/v0/cluster_events", "/events", "/logical/actors",
        "/api/serve/applications/",
    ]  # fmt: skip
    found = {}
    for page in pages:
        request = urllib.request.Request(address + page, headers={"Authorization": f"Bearer {TOKEN}"})
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=30) as answer:
            found[page] = answer.read().decode()
    assert {"/api/jobs/", "/api/v0/runtime_envs", "/nodes?view=summary"} <= set(found)
    return found


def test_code_files_and_secrets_arrive_and_the_secrets_nowhere_else(head, stand_in):
    address, folder = head
    spec = make_job(secrets={"HF_TOKEN": "env"})
    job = jobs.submit(spec, cluster_at(address), secrets={"HF_TOKEN": PLANTED}, arguments=["--resume"])
    assert job.id == f"{job.run}-1"
    log = log_of(job)
    assert jobs.status(job.id, address).status == "SUCCEEDED", log
    said = told(log)
    assert said["arguments"] == ["run", "job.yaml", "--json", "--resume"]
    assert "environment/bin/python" in said["python"]
    assert "_ray_pkg_" in said["here"] and said["there"] == said["here"]
    assert said["files"] == ["base", "cluster.yaml", "job.yaml", "rows.jsonl", "start.sh"]
    assert said["cluster"] == "auto"
    assert said["secret"][::-1] == PLANTED  # it reached the job (printed backwards, to be looked for below)

    shown = everything_that_a_dashboard_shows(address)
    assert job.id in shown["/api/jobs/"]  # the pages are those of this job
    assert [page for page, text in shown.items() if PLANTED in text] == []
    info = [
        jobs.status(job.id, address).to_dict(),
        job.to_dict(),
        *[each.to_dict() for each in jobs.list_jobs(address)],
    ]
    assert PLANTED not in json.dumps(info) + log
    written = subprocess.run(["grep", "-rlaF", PLANTED, str(folder)], capture_output=True, text=True)
    assert written.stdout == ""  # logs, unpacked packages, stored specs
    control = subprocess.run(["grep", "-rlaF", said["secret"], str(folder)], capture_output=True, text=True)
    assert "job-driver" in control.stdout  # the search does look where things would be


def test_a_second_submission_of_a_run_is_its_next_attempt(head, stand_in):
    address, _ = head
    first = jobs.submit(make_job(name="again"), cluster_at(address))
    log_of(first)
    second = jobs.submit(make_job(name="again"), cluster_at(address))
    log_of(second)
    assert (first.id, second.id) == (f"{first.run}-1", f"{first.run}-2")


def test_cancel_lets_a_job_save_and_leaves_nothing(head, stand_in):
    address, _ = head
    job = jobs.submit(make_job(name="long"), cluster_at(address), arguments=["--wait"])
    wait_until(lambda: "PIDS" in "".join(jobs.logs(job.id, address)))
    log = "".join(jobs.logs(job.id, address))
    pids = [int(pid) for pid in log.partition("PIDS ")[2].split()[:2]]
    assert all(keeper.start_ticks(pid) is not None for pid in pids)
    started = time.monotonic()
    assert jobs.cancel(job.id, address).status == "STOPPED"
    wait_until(lambda: "saved a checkpoint" in "".join(jobs.logs(job.id, address)))
    wait_until(lambda: all(keeper.start_ticks(pid) is None for pid in pids), timeout_s=25)
    wait_until(lambda: placement_groups(address) == ["REMOVED"], timeout_s=25)
    assert time.monotonic() - started < patience(60)
    assert jobs.cancel(job.id, address).status == "STOPPED"


def placement_groups(address):
    listed = Dashboard(address).get("/api/v0/placement_groups?detail=1")["data"]["result"]["result"]
    return [group["state"] for group in listed]


def test_what_the_environment_lacks_is_named_before_anything_is_sent(head, monkeypatch):
    address, _ = head
    monkeypatch.setattr(
        jobs, "requirements", lambda: ["no-such-thing>=1", "pydantic>=999", "ray[default]>=2"]
    )
    known = {job.id for job in jobs.list_jobs(address)}
    with pytest.raises(ClusterError) as caught:
        jobs.submit(make_job(name="lacking"), cluster_at(address))
    said = str(caught.value)
    assert "environment/bin/python) lacks no-such-thing>=1, pydantic>=999 (2." in said
    assert "install: true in the cluster file, or raypeft submit --install." in said
    assert {job.id for job in jobs.list_jobs(address)} == known


def test_what_lacks_is_installed_for_the_job(head, stand_in, monkeypatch, tmp_path):
    """A distribution that the cluster has not, as a wheel on its disk: no registry is asked."""
    address, _ = head
    files = {
        "raypeft_absent.py": b"here = True\n",
        "raypeft_absent-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: raypeft-absent\nVersion: 1.0\n",
        "raypeft_absent-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "raypeft_absent-1.0.dist-info/RECORD": b"",
    }
    archive = tmp_path / "raypeft_absent-1.0-py3-none-any.whl"
    archive.write_bytes(wheel.zip_bytes(files))
    needed = ["ray[default]>=2", "pydantic>=2", f"raypeft-absent @ file://{archive}"]
    monkeypatch.setattr(jobs, "requirements", lambda: needed)
    with pytest.raises(ClusterError, match="lacks raypeft-absent"):
        jobs.submit(make_job(name="installed"), cluster_at(address))
    job = jobs.submit(make_job(name="installed"), cluster_at(address), install=True)
    log = log_of(job)
    assert jobs.status(job.id, address).status == "SUCCEEDED", log
    assert told(log)["absent"] == [True, True]  # to the driver, and to a worker


def test_a_wrong_token_and_none_are_refused(head, monkeypatch):
    address, _ = head
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(ClusterError, match="the cluster refuses the token from RAY_AUTH_TOKEN"):
        jobs.submit(make_job(), cluster_at(address))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ClusterError, match="the cluster asks for a token"):
        jobs.list_jobs(address)


def test_an_envelope_opens_once(head, stand_in):
    """The name and the key of a used envelope, which the job's record shows, open nothing any more."""
    address, _ = head
    spec = make_job(name="once", secrets={"HF_TOKEN": "env"})
    job = jobs.submit(spec, cluster_at(address), secrets={"HF_TOKEN": PLANTED})
    log_of(job)
    record = Dashboard(address).get(f"/api/jobs/{job.id}")
    package = record["runtime_env"]["env_vars"]["RAYPEFT_ENVELOPE"].partition(":")[0]
    assert not Dashboard(address).has_package(package)
    assert Dashboard(address).has_package(record["runtime_env"]["working_dir"].removeprefix("gcs://"))


def test_rays_upload_limit_is_what_we_take_it_for(head):
    """Just below it a package is stored; a little above Ray refuses it."""
    address, _ = head
    name = "_ray_pkg_limit.zip"
    Dashboard(address).put_package(name, bytes(UPLOAD_LIMIT_BYTES))
    with pytest.raises(ClusterError):
        Dashboard(address).put_package("_ray_pkg_above.zip", bytes(UPLOAD_LIMIT_BYTES + 1))


def test_a_version_is_deployed_asked_and_undeployed_from_outside(head, tmp_path):
    """The real command, as short jobs: `deploy`, `endpoints`, `ask`, `undeploy`, and what the cluster refuses."""
    address, _ = head
    base = tiny.save_base(tmp_path / "bases" / "tiny")
    registry = Registry(tmp_path / "registry")
    tiny.register(registry, "docs", base, tmp_path / "scratch")
    tiny.register(
        registry, "other", tiny.save_base(tmp_path / "bases" / "gone", seed=3), tmp_path / "scratch"
    )
    (tmp_path / "bases" / "gone").rename(tmp_path / "bases" / "moved")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "there.yaml").write_text(
        f"kind: address\naddress: {address}\nstorage: {tmp_path}/runs\nregistry: {registry.url}\n"
        f"serve: {{port: {port}}}\n"
    )
    events = []
    made = api.deploy("docs@1", cluster="there.yaml", on_event=events.append)
    assert made.to_dict() == {
        "endpoint": "tiny", "url": f"http://127.0.0.1:{port}/tiny/v1", "model": "docs@1", "base_name": "tiny",
        "state": "live", "rollout": None,
    }  # fmt: skip
    assert "endpoint tiny: loading docs@1" in [event.get("message") for event in events]
    assert registry.alias("docs", "production") == 1
    (row,) = api.endpoints(cluster="there.yaml")
    assert (row.name, row.state, row.adapters) == ("tiny", "live", ("docs@1",))
    answers = [api.ask(model, "def f(", max_tokens=8, cluster="there.yaml") for model in ("docs", "tiny")]
    assert answers[0] != answers[1]

    with pytest.raises(ModelError) as caught:
        api.deploy("other@1", cluster="there.yaml")
    assert f"the base 'gone' of other@1 was looked for in {tmp_path}/bases/gone on " in str(caught.value)
    assert "raypeft register DIR --name other --base PLACE" in str(caught.value)
    with pytest.raises(ServeError, match=r"there is no endpoint 'tinny'. Closest: 'tiny'"):
        api.undeploy("tinny", cluster="there.yaml")

    api.undeploy("docs@1", cluster="there.yaml")
    (row,) = api.endpoints(cluster="there.yaml")
    assert (row.state, row.adapters) == ("live", ())
    api.undeploy("tiny", cluster="there.yaml")
    assert api.endpoints(cluster="there.yaml") == []
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/tiny/v1/models", timeout=5)
