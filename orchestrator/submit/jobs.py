"""Jobs on a Ray cluster, through its Jobs API: submit, status, logs, cancel, list.

A job's id is its run's id and the number of the attempt. Its code is this project's wheel (`wheel.py`), its
working directory the payload (`payload.py`), its secrets an envelope (`envelope.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets as random
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub.errors import HfHubHTTPError

from ..cluster import Cluster, ClusterFacts, check_storage
from ..errors import ClusterError, ModelError, RunError, closest
from ..identity import data_hash
from ..model_folder import model_folder
from ..plan import make_plan
from ..plan.sweep import make_sweep_plan
from ..spec.canonical import canonical_hash
from ..spec.job import JobSpec
from ..store import run_identity
from .dashboard import Dashboard
from .envelope import VARIABLE, Envelope, close_envelope
from .facts import facts_at, not_ray
from .payload import CLUSTER_FILE, SPEC_FILE, START, START_FILE, pack
from .wheel import build_wheel, requirements, zip_bytes

MARK = "RAYPEFT-ENVIRONMENT"
"""Begins the line that `environment.py` prints."""
CHECK_S = 120.0
"""A busy head takes half a minute to start a job; one that takes longer is stuck."""
STOP_S = 28
"""What a cancelled job has to write its checkpoint, before Ray kills it."""
CHECK = "raypeft-check-"
"""Begins the id of a check of the environment."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
RUN_KEY = "raypeft.run"


@dataclass(frozen=True)
class SubmittedJob:
    """A job that a cluster has taken."""

    id: str
    run: str
    """The run's id in the cluster's storage: every attempt goes on with the same run."""
    address: str

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class JobState:
    """A job as the cluster knows it."""

    id: str
    status: str
    """PENDING | RUNNING | SUCCEEDED | FAILED | STOPPED"""
    message: str
    run: str | None = None
    start_time: float | None = None
    end_time: float | None = None
    """Unix seconds."""

    @property
    def has_ended(self) -> bool:
        """Whether it will not change any more."""
        return self.status in ENDED

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class Request:
    """All that is sent for one job."""

    id: str
    run: str | None
    entrypoint: str
    runtime_env: dict[str, Any]
    packages: dict[str, bytes] = field(repr=False)
    """Name in the cluster's store -> content."""

    def body(self) -> dict[str, Any]:
        """What is posted to `/api/jobs/`."""
        run = {RUN_KEY: self.run} if self.run else {}
        return {
            "submission_id": self.id,
            "entrypoint": self.entrypoint,
            "runtime_env": self.runtime_env,
            "metadata": {**run, "raypeft.version": metadata.version("raypeft")},
        }


def submit(
    spec: JobSpec,
    cluster: Cluster,
    *,
    secrets: Mapping[str, str] | None = None,
    install: bool = False,
    arguments: Sequence[str] = (),
) -> SubmittedJob:
    """Sends a job to the cluster and returns once the cluster has taken it.

    Args:
        secrets: name -> value, as `spec.secrets.read_secrets` gives them.
        install: install what the cluster's environment lacks; else it is an error that names all of it.
        arguments: more for `raypeft run` on the cluster, such as `--resume`.

    Raises:
        ClusterError: no answer, the token is refused, another Ray or Python, an environment that lacks
            something, several nodes without shared storage.
        PlacementError: more than the cluster can ever give, its autoscaler's maximum counted.
        DataError: local files that are absent, or too large to travel.
        RunError: the run is going on there already.
    """
    dashboard = Dashboard(address_of(cluster))
    facts = facts_at(dashboard)
    check_versions(facts)
    check_storage(spec, cluster, facts)
    _check_room(spec, facts)
    payload = pack(pinned(spec), cluster)
    content = payload.zip()
    run = run_id(payload.spec, data_hash(spec))
    known = _known(dashboard)
    _refuse_second(known, run, dashboard.address)
    found = ask_environment(dashboard)
    _check_room(spec, with_limits(facts, found["max"]))
    missing = to_install(found, dashboard.address, install=install or cluster.install)
    envelope = close_envelope(secrets) if secrets else None
    attempt = _next_attempt(known, run)
    id = send(dashboard, run_request(content, run, attempt, missing, envelope, arguments))
    return SubmittedJob(id, run, dashboard.address)


def send(dashboard: Dashboard, request: Request) -> str:
    """Sends what the cluster has not, then the job; returns its id once the cluster has taken it."""
    for name, package in request.packages.items():
        if not dashboard.has_package(name):
            dashboard.put_package(name, package)
    return dashboard.post("/api/jobs/", request.body())["submission_id"]


def run_request(
    content: bytes,
    run: str,
    attempt: int,
    pip: Sequence[str] = (),
    envelope: Envelope | None = None,
    arguments: Sequence[str] = (),
) -> Request:
    """The request for an attempt at a run; `content` is its payload's."""
    command = ["run", SPEC_FILE, "--json", *arguments]
    return make_request(f"{run}-{attempt}", content, command, run=run, pip=pip, envelope=envelope)


def make_request(
    id: str,
    content: bytes,
    command: Sequence[str],
    *,
    run: str | None = None,
    pip: Sequence[str] = (),
    envelope: Envelope | None = None,
) -> Request:
    """The request for a job that is one command of ours, made of what was found out before; pure.

    Args:
        content: the job's working directory as a zip, with `cluster.yaml` and `start.sh` in it.
        command: what follows `raypeft`.
    """
    _, wheel = build_wheel()
    names = {_package_name(content): content, _package_name(wheel): wheel}
    folder, code = (f"gcs://{name}" for name in names)
    variables = {
        "RAYPEFT_CLUSTER": CLUSTER_FILE,
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),
    }
    runtime_env: dict[str, Any] = {"working_dir": folder, "py_modules": [code], "env_vars": variables}
    module = "orchestrator"
    if envelope is not None:
        names[envelope.package] = envelope.content
        variables[VARIABLE] = envelope.reference
        module = "orchestrator.submit.bootstrap"
    if pip:
        variables["RAYPEFT_INSTALLED"] = "1"
        runtime_env["pip"] = {"packages": list(pip), "pip_check": False}
    entrypoint = shlex.join(["sh", START_FILE, "-m", module, *command])
    return Request(id, run, f"exec {entrypoint}", runtime_env, names)


def describe(spec: JobSpec, cluster: Cluster, *, install: bool = False, arguments: Sequence[str] = ()) -> str:
    """What `submit` would send to the cluster's address, as JSON: the request, and each file with its size.
    Nothing is sent, and no secret is read.

    Raises:
        DataError: local files that are absent, or too large to travel.
    """
    payload = pack(pinned(spec), cluster)
    content = payload.zip()
    run = run_id(payload.spec, data_hash(spec))
    envelope = Envelope("raypeft_NAME.zip", b"", "KEY") if spec.secrets else None
    pip = requirements() if install or cluster.install else ()
    request = run_request(content, run, 1, pip, envelope, arguments)
    shown = {
        "POST": f"{address_of(cluster)}/api/jobs/",
        "body": request.body(),
        "packages": {f"gcs://{name}": len(package) for name, package in request.packages.items()},
        "local_files": {local.written: local.size_bytes for local in payload.local},
        "spec": payload.texts[SPEC_FILE],
    }
    return json.dumps(shown, indent=2) + "\n"


def status(id: str, address: str) -> JobState:
    """One job. Raises RunError where the cluster has none of this id."""
    dashboard = Dashboard(address)
    found = dashboard.get(f"/api/jobs/{quote(id, safe='')}")
    if found is None:
        raise _unknown(id, dashboard)
    return _state(found)


def list_jobs(address: str) -> list[JobState]:
    """The jobs that the cluster knows, newest first; those that were not submitted here too."""
    return sorted(_known(Dashboard(address)), key=lambda job: job.start_time or 0, reverse=True)


def logs(id: str, address: str, *, follow: bool = False) -> Iterator[str]:
    """What the job printed, in pieces; with `follow` until it has ended.

    Raises:
        RunError: no such job.
        ClusterError: the cluster does not answer (any more).
    """
    dashboard = Dashboard(address)
    told, path = 0, f"/api/jobs/{quote(id, safe='')}"
    while True:
        found = dashboard.get(path, timeout_s=30.0)
        if found is None:
            raise _unknown(id, dashboard)
        ended = _state(found).has_ended  # asked before the log: what it printed last is then in the log
        text = (dashboard.get(f"{path}/logs", timeout_s=60.0) or {}).get("logs") or ""
        if len(text) > told:
            yield text[told:]
            told = len(text)
        if ended or not follow:
            return
        time.sleep(min(5.0, 0.5 + told / 4e6))  # each look fetches the whole log


def cancel(id: str, address: str) -> JobState:
    """Asks the job to save and leave, and waits until it has (Ray kills it after 28 s).

    Raises:
        RunError: no such job.
        ClusterError: it is still there long after it should have been killed.
    """
    dashboard = Dashboard(address)
    path = f"/api/jobs/{quote(id, safe='')}"
    found = dashboard.get(path)
    if found is None:
        raise _unknown(id, dashboard)
    if _state(found).has_ended:
        return _state(found)
    dashboard.post(f"{path}/stop")
    deadline = time.monotonic() + STOP_S + 15
    while time.monotonic() < deadline:
        state = _state(dashboard.get(path))
        if state.has_ended:
            return state
        time.sleep(0.2)
    raise ClusterError(
        f"job '{id}' was told to stop {STOP_S + 15} s ago and is still {state.status}.",
        where=dashboard.address,
        hint=f"Look at its log: raypeft logs {id} --address {dashboard.address}",
    )


def run_id(spec: JobSpec, data: str | None = None) -> str:
    """The id that the run gets in the cluster's storage: its name and the first digits of its identity.

    Args:
        spec: as it travels.
        data: the hash of its data, where its files do not yet lie where they travel to.
    """
    return f"{spec.name}-{run_identity(canonical_hash(spec), data or data_hash(spec))[:8]}"


def pinned(spec: JobSpec) -> JobSpec:
    """The job with the hub's branch or tag resolved to the commit that it is now. Where the hub does not
    answer here, as written: the cluster may see it.

    Raises:
        ModelError: the base does not exist, or may not be read.
    """
    try:
        commit = model_folder(spec.model.base_model, spec.model.revision).revision
    except ModelError as error:
        if "://" in spec.model.base_model or not isinstance(error.__cause__, HfHubHTTPError):
            if Path(spec.model.base_model).expanduser().exists() or error.__cause__ is None:
                raise
            return spec
        raise
    if commit is None or commit == spec.model.revision:
        return spec
    return spec.model_copy(update={"model": spec.model.model_copy(update={"revision": commit})})


def check_versions(facts: ClusterFacts) -> None:
    """The cluster's Ray and Python must be this environment's: the code that travels was made for them.

    Raises:
        ClusterError: naming both versions of what differs.
    """
    ours = {"Ray": metadata.version("ray"), "Python": _python()}
    theirs = {"Ray": facts.ray_version, "Python": facts.python_version}
    other = [
        f"{name} {there} (here: {ours[name]})"
        for name, there in theirs.items()
        if there is not None and _minor(there) != _minor(ours[name])
    ]
    if other:
        raise ClusterError(
            f"the cluster runs {' and '.join(other)}; a job needs the same on both sides.",
            where=facts.source,
            hint="Install the cluster's versions here, or start the cluster as in clusters/Dockerfile.",
        )


def to_install(found: Mapping[str, Any], address: str, *, install: bool) -> list[str]:
    """The requirements to install with the job, of what `ask_environment` found; none where nothing lacks.

    Raises:
        ClusterError: something lacks and `install` is off.
    """
    missing = found["missing"]
    if missing and not install:
        named = ", ".join(_named(each) for each in missing)
        raise ClusterError(
            f"the cluster's environment ({found['executable']}) lacks {named}.",
            where=address,
            hint="Install them there, or have them installed with each job: install: true in the cluster "
            "file, or raypeft submit --install.",
        )
    return [str(each["requirement"]) for each in missing]


def with_limits(facts: ClusterFacts, limits: Mapping[str, float] | None) -> ClusterFacts:
    """`facts` with the autoscaler's maxima, which only a driver of the cluster can see; as they are without."""
    if not limits:
        return facts
    return replace(
        facts,
        max_cpus=max(limits.get("CPU", 0), sum(node.cpus for node in facts.nodes)),
        max_gpus=max(limits.get("GPU", 0), sum(node.gpus for node in facts.nodes)),
    )


def ask_environment(dashboard: Dashboard) -> dict[str, Any]:
    """What `environment.py` prints, run as a job of its own on the cluster.

    Raises:
        ClusterError: the check itself failed.
    """
    script = Path(__file__).with_name("environment.py").read_bytes()
    package = zip_bytes({"environment.py": script, START_FILE: START.encode()})
    name = _package_name(package)
    if not dashboard.has_package(name):
        dashboard.put_package(name, package)
    id = f"{CHECK}{random.token_hex(4)}"
    command = shlex.join(["sh", START_FILE, "environment.py", *requirements()])
    body = {
        "submission_id": id,
        "entrypoint": f"exec {command}",
        "runtime_env": {"working_dir": f"gcs://{name}"},
    }
    dashboard.post("/api/jobs/", body)
    state = _wait_for_end(dashboard, id)
    said = (dashboard.get(f"/api/jobs/{id}/logs", timeout_s=30.0) or {}).get("logs") or ""
    for line in said.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    lines = [line for line in said.splitlines() if line.strip()]
    raise ClusterError(
        f"the check of the cluster's environment failed: {lines[-1] if lines else state.message}",
        where=dashboard.address,
        hint="Ray's own log on the head says more: jobs/supervisor-*.log.",
    )


def _wait_for_end(dashboard: Dashboard, id: str) -> JobState:
    deadline = time.monotonic() + CHECK_S
    while time.monotonic() < deadline:
        state = _state(dashboard.get(f"/api/jobs/{id}"))
        if state.has_ended:
            return state
        time.sleep(0.2)
    dashboard.post(f"/api/jobs/{id}/stop")
    raise ClusterError(
        f"the cluster did not run a small check within {CHECK_S:.0f} s: {state.message}",
        where=dashboard.address,
        hint="Is the head node overloaded? Its dashboard shows the jobs that wait.",
    )


def _named(missing: Mapping[str, str | None]) -> str:
    installed = missing["installed"]
    return (
        f"{missing['requirement']} ({installed} is installed)" if installed else str(missing["requirement"])
    )


def address_of(cluster: Cluster) -> str:
    """Where the cluster's Jobs API is. Raises ClusterError where its file does not say."""
    if cluster.address:
        return cluster.address
    how = {
        "launcher": "Start it with `ray up`, forward its dashboard with `ray dashboard`, and write "
        "address: http://127.0.0.1:8265 into the cluster file (or submit with --address).",
        "kuberay": "Write the address of a running cluster into the file (address: http://127.0.0.1:8265, with "
        "kubectl port-forward service/HEAD 8265) or submit with --address, or apply the RayJob: "
        "raypeft submit FILE --dry-run | kubectl apply -f -",
    }
    raise ClusterError(
        f"cluster '{cluster.name}' (kind {cluster.kind}) has no address to submit to.",
        where=cluster.path,
        hint=how.get(cluster.kind, "Give --address http://HOST:8265, or run it here: raypeft run FILE"),
    )


def _check_room(spec: JobSpec, facts: ClusterFacts) -> None:
    """Raises PlacementError where the cluster can never give what the job, or a trial of its sweep, asks."""
    if spec.sweep is not None:
        make_sweep_plan(spec, facts, None)
    else:
        make_plan(spec, facts, None)


def _known(dashboard: Dashboard) -> list[JobState]:
    """All jobs that were submitted, but for our own checks of the environment."""
    listed = dashboard.get("/api/jobs/", timeout_s=30.0)
    if not isinstance(listed, list):
        raise not_ray(dashboard)
    jobs = [_state(each) for each in listed if each.get("submission_id")]
    for job in jobs:
        # Not at once: Ray still writes to the record of a job that has just ended, and would bring it back.
        if job.id.startswith(CHECK) and job.has_ended and (job.end_time or 0) < time.time() - 60:
            dashboard.delete(f"/api/jobs/{job.id}")
    return [job for job in jobs if not job.id.startswith(CHECK)]


def _state(found: Mapping[str, Any]) -> JobState:
    def seconds(key: str) -> float | None:
        return found[key] / 1000 if found.get(key) else None

    return JobState(
        id=found["submission_id"],
        status=found["status"],
        message=found.get("message") or "",
        run=(found.get("metadata") or {}).get(RUN_KEY),
        start_time=seconds("start_time"),
        end_time=seconds("end_time"),
    )


def _refuse_second(known: list[JobState], run: str, address: str) -> None:
    going_on = [job for job in known if job.run == run and not job.has_ended]
    if going_on:
        raise RunError(
            f"run '{run}' is {going_on[0].status.lower()} there already, as job '{going_on[0].id}'.",
            where=address,
            hint=f"Follow it: raypeft logs {going_on[0].id} -f --address {address}",
        )


def _next_attempt(known: list[JobState], run: str) -> int:
    numbers = [int(match[1]) for job in known if (match := re.fullmatch(rf"{re.escape(run)}-(\d+)", job.id))]
    return max(numbers, default=0) + 1


def _unknown(id: str, dashboard: Dashboard) -> RunError:
    ids = [job.id for job in _known(dashboard)]
    near = closest(id, ids)
    hint = f"Closest: '{near[0]}'." if near else f"List them: raypeft jobs --address {dashboard.address}"
    return RunError(f"the cluster has no job '{id}'.", where=dashboard.address, hint=hint)


def _package_name(content: bytes) -> str:
    """By content, so that what the cluster has is not sent again."""
    return f"_ray_pkg_{hashlib.sha256(content).hexdigest()[:32]}.zip"


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def _python() -> str:
    return ".".join(map(str, sys.version_info[:3]))
