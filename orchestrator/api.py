"""What the command line does, as functions: each command is one function here that returns typed objects.

from orchestrator import api
result = api.run("jobs/quickstart.yaml", ["training.num_epochs=2"])
print(result.adapter, result.metrics["eval_loss"])
print(api.ask("python-docs", "What does shutil.copytree do?"))
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from . import ask as asking
from . import local_ray, service, wiring
from .adapter_folder import check_adapter
from .cluster import Cluster, load_cluster
from .errors import (
    ClusterError,
    ModelError,
    RaypeftError,
    RegistryError,
    RunError,
    ServeError,
    SpecError,
    closest,
)
from .identity import base_identity
from .keys import PERIODS, KeyBook, KeyRow, NewKey
from .lineage import Lineage
from .merging.merge import Adapter as AdapterToMerge
from .merging.merge import MergeResult, check_out
from .merging.merge import merge as merge_adapter
from .plan import Plan
from .plan.sweep import SweepPlan
from .processes import is_alive
from .registry import AdapterRow, AdapterVersion, Registry, check_name
from .runner import Event
from .serve import promotion, traffic
from .serve.askable import check_askable
from .service import Deployment, OnEvent, RunResult
from .spec import canonical
from .spec import methods as method_rows
from .spec import schema as schemas
from .spec import templates as job_templates
from .spec.job import DeploySpec, JobSpec
from .spec.load import LoadedJob, load_job, load_job_mapping
from .spec.overrides import apply_overrides
from .spec.places import Path as SpecPath
from .spec.places import Problem, Tree, dotted
from .spec.rules import check_deploy
from .spec.secrets import read_secrets
from .spec.tasks import TASKS
from .spec.unknown import unknown_key
from .spec.words import explain
from .spending import Spending
from .store import RunRecord, RunStore
from .sweep.result import SweepResult, read_sweep

if TYPE_CHECKING:
    from .serve.endpoints import EndpointInfo
    from .submit.jobs import JobState, SubmittedJob
    from .train.inspection import Inspection

CANCEL_S = 40.0
"""A run leaves within 30 s of being asked to."""

JobSource = str | os.PathLike[str] | Mapping[str, Any] | LoadedJob


def ignore(event: Event) -> None:
    """Takes an event and does nothing."""


# writing a job


def load(job: JobSource, overrides: Sequence[str] = ()) -> LoadedJob:
    """A job from a file, a mapping (in a notebook), or loaded already.

    Raises:
        SpecError: it breaks a rule; with file, line and key.
    """
    if isinstance(job, LoadedJob):
        return job
    if isinstance(job, Mapping):
        return load_job_mapping(job, overrides=overrides)
    return load_job(job, overrides)


def validate(job: JobSource, overrides: Sequence[str] = ()) -> LoadedJob:
    """Checks a job against the schema and the rules across its keys, and that its cluster file exists."""
    loaded = load(job, overrides)
    _cluster(None, loaded)
    return loaded


def resolved(spec: JobSpec) -> str:
    """The job as YAML, every default filled in."""
    return canonical.resolved_yaml(spec)


def schema() -> dict[str, Any]:
    """The JSON Schema of a job, for editors."""
    return schemas.json_schema()


def methods() -> list[method_rows.MethodRow]:
    """The adapter methods that there are."""
    return method_rows.method_rows()


def method(name: str) -> method_rows.MethodRow:
    """One adapter method with its fields; raises SpecError, with the closest name, where there is none."""
    return method_rows.method_row(name)


def templates() -> list[tuple[str, str]]:
    """Name and one line of each template of `init`."""
    return job_templates.list_templates()


def init(template: str, directory: str | Path = ".", *, force: bool = False) -> list[Path]:
    """Writes a commented job file and what it needs; returns the paths written."""
    return job_templates.write_template(template, Path(directory), force=force)


def inspect(job: JobSource, rows: int = 3, overrides: Sequence[str] = ()) -> Inspection:
    """Renders a job's rows as the model will read them. Imports torch's tokenizers, unlike its neighbours."""
    return wiring.inspect_rows(load(job, overrides).spec, rows)


def plan(job: JobSource, overrides: Sequence[str] = (), *, cluster: str | None = None) -> Plan | SweepPlan:
    """How a job would run: workers, batch arithmetic, memory, whether it fits; of a sweep also how many trials, packed
    how, and about how long."""
    loaded = load(job, overrides)
    if loaded.spec.sweep is not None:
        return service.plan_sweep(loaded.spec, _environment(_cluster(cluster, loaded), loaded))
    return service.plan_job(loaded.spec, _environment(_cluster(cluster, loaded), loaded))


# runs


def run(
    job: JobSource,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    new: bool = False,
    resume: bool = False,
    force: bool = False,
    on_event: OnEvent = ignore,
) -> RunResult:
    """Trains, gates, registers and deploys a job, here, to the end; the same call again goes on or says "done".

    Args:
        overrides: `training.learning_rate=1e-4`, as `--set` takes them.
        cluster: a cluster file, a name or an address, before RAYPEFT_CLUSTER and the job's own key.
        new: number a new run where the name is taken by another spec.
        resume: take over the run of this name although keys that may change did.
        force: deploy although the gate refuses.
        on_event: called with each event (see `runner.Event`).

    Raises:
        RaypeftError: what failed, where, and what to do next.
    """
    loaded = load(job, overrides)
    where = _cluster(cluster, loaded)
    was_up = _is_up(where)
    environment = _environment(where, loaded)
    secrets = read_secrets(loaded)
    for warning in loaded.warnings:
        on_event({"event": "warning", "message": warning})
    stop = service.StopRequest()
    try:
        with _signals(stop):
            result = service.run_job(
                loaded.spec,
                environment,
                secrets=secrets,
                new=new,
                resume=resume,
                force=force,
                on_event=on_event,
                stop=stop,
            )
        if loaded.spec.sweep is not None:
            result = replace(result, sweep=read_sweep(environment.runs.get(result.job)).to_dict())
        result = _with_answers(result, environment.registry)
    finally:
        stays = _stays_up(where, was_up) or _leave(where)
        wiring.disconnect()
    why = (
        "another command, which ends it"
        if local_ray.is_left()
        else "the endpoint; end both with: raypeft down"
    )
    notes = (f"Ray stays up for {why}",) if stays and not was_up else ()
    return replace(result, notes=(*result.notes, *notes))


@contextlib.contextmanager
def _signals(stop: service.StopRequest) -> Iterator[None]:
    """Within the context Ctrl-C and SIGTERM ask for a checkpoint first."""

    def ask(number: int, frame: object) -> None:
        stop.ask()

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are the program's own business
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_up(cluster: Cluster) -> bool:
    """Whether the cluster's Ray is there already, or is not ours to end."""
    return cluster.kind != "local" or local_ray.current() is not None


def _stays_up(cluster: Cluster, was_up: bool) -> bool:
    """Whether this command is not to end the cluster's Ray: it was up before, and not left to it by another."""
    return was_up and not (cluster.kind == "local" and local_ray.is_left())


def _leave(cluster: Cluster) -> bool:
    """Ends the Ray that this command started; returns True where it stays, because an endpoint lives on it or another
    command uses it."""
    if local_ray.current() is None:
        return False
    with contextlib.suppress(RaypeftError):  # it must end also where the registry cannot be read
        if any(row.state != "down" for row in wiring.endpoint_rows(cluster)):
            return True
    wiring.disconnect()
    return not local_ray.leave()


def _with_answers(result: RunResult, registry: Registry) -> RunResult:
    """Asks the base and the adapter one and the same question, where the endpoint answers."""
    endpoint, question = result.endpoint, result.question
    if endpoint is None or endpoint.state != "live":
        return result
    key = _key(registry)
    try:
        asking.models(endpoint.url, key)
    except ServeError:
        note = f"Its endpoint is down; start it again: raypeft deploy {result.adapter}"
        return replace(result, notes=(note,))
    if question is None:
        return result
    task = service.task_to_ask(registry.get(result.adapter)) if result.adapter else None
    base = asking.ask(endpoint.url, endpoint.base_name, question, max_tokens=64, key=key)
    asked: dict[str, Any] = {"max_tokens": 64, "task_id": task}
    adapter = asking.ask(endpoint.url, endpoint.model, question, key=key, **asked)
    curl = asking.curl_line(endpoint.url, endpoint.model, question, with_key=key is not None, **asked)
    return replace(result, comparison=service.Comparison(question, base, adapter, curl))


def improvement(metrics: Mapping[str, float]) -> list[str]:
    """`held-out loss 1.93, the bare base's 3.10: 37.7 % lower`, where both were measured."""
    ours, theirs = metrics.get("eval_loss"), metrics.get("base.eval_loss")
    if not ours or not theirs:
        return []
    change = 100 * (1 - ours / theirs)
    word = "lower" if change >= 0 else "higher"
    return [f"held-out loss {ours:.4f}, the bare base's {theirs:.4f}: {abs(change):.1f} % {word}"]


def storage(cluster: str | None = None) -> str:
    """Where runs are read from."""
    return load_cluster(cluster).storage


def jobs(*, cluster: str | None = None) -> list[RunRecord]:
    """All stored runs, the oldest first. Needs no cluster."""
    return _environment(load_cluster(cluster)).runs.list()


def status(id: str, *, cluster: str | None = None) -> RunRecord:
    """One stored run by its id, a part of it, or the job's name; by its folder's URL where a job's `storage.path` has
    it elsewhere. Needs no cluster."""
    runs, name = _stored_run(id, cluster)
    return runs.get(name)


def sweep(id: str, *, cluster: str | None = None) -> SweepResult:
    """A sweep's trials as they stand, under way or ended, by what `status` takes. Needs no cluster.

    Raises:
        RunError: there is no such run, or its job has no sweep.
    """
    return read_sweep(status(id, cluster=cluster))


def logs(id: str, *, follow: bool = False, cluster: str | None = None) -> Iterator[Event]:
    """A run's events; with `follow` until it has ended."""
    runs, name = _stored_run(id, cluster)
    return runs.events(name, follow=follow)


def worker_log(id: str, worker: int, *, follow: bool = False, cluster: str | None = None) -> Iterator[str]:
    """What one worker printed."""
    runs, name = _stored_run(id, cluster)
    return runs.log(name, worker, follow=follow)


def cancel(id: str, *, address: str | None = None, cluster: str | None = None) -> str:
    """Stops a run and waits until it has saved a checkpoint and left; returns its state.

    Args:
        address: the cluster whose Jobs API has it; None: a driver on this machine.

    Raises:
        RunError: no such run, it has ended, or its driver is elsewhere or does not leave.
    """
    if address:
        return wiring.jobs_api().cancel(id, address).status
    runs, name = _stored_run(id, cluster)
    record = runs.get(name)
    if record.has_ended or record.holder is None:
        raise RunError(f"run '{record.id}' is not going on: {record.state}.")
    driver = record.holder.process
    if not is_alive(driver):
        raise RunError(
            f"run '{record.id}' is driven by {record.holder}, not from this machine.",
            hint="Cancel it there, or through its cluster: raypeft cancel ID --address http://HOST:8265.",
        )
    os.kill(driver.pid, signal.SIGINT)
    deadline = time.monotonic() + CANCEL_S
    while not (record := runs.get(record.id)).has_ended:
        if time.monotonic() > deadline:
            raise RunError(f"run '{record.id}' was asked to stop {CANCEL_S:.0f} s ago and has not left yet.")
        time.sleep(0.2)
    return record.state


# jobs on a cluster


def submit(
    job: JobSource,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    cluster: str | None = None,
    install: bool = False,
) -> SubmittedJob:
    """Sends a job to a Ray cluster and returns once the cluster has taken it.

    Args:
        address: http://HOST:8265; else the cluster's own.
        install: install there what its environment lacks.

    Raises:
        ClusterError: no answer, another Ray or Python, something is missing there.
        RunError: the run is going on there already.
    """
    loaded = load(job, overrides)
    where = _remote(address, cluster, loaded)
    return wiring.jobs_api().submit(loaded.spec, where, secrets=read_secrets(loaded), install=install)


def submission(
    job: JobSource,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    cluster: str | None = None,
    install: bool = False,
) -> str:
    """What `submit` would send: for KubeRay a complete RayJob as YAML, else the request as JSON."""
    loaded = load(job, overrides)
    where = _remote(address, cluster, loaded)
    if where.kind == "kuberay":
        return wiring.rayjob(loaded.spec, where)
    return wiring.jobs_api().describe(loaded.spec, where, install=install)


def submitted_jobs(*, address: str) -> list[JobState]:
    """The jobs that a cluster knows, the newest first."""
    return wiring.jobs_api().list_jobs(address)


def job_status(id: str, *, address: str) -> JobState:
    """One job as its cluster knows it."""
    return wiring.jobs_api().status(id, address)


def job_logs(id: str, *, address: str, follow: bool = False) -> Iterator[str]:
    """What a job printed, in pieces; with `follow` until it has ended."""
    return wiring.jobs_api().logs(id, address, follow=follow)


def follow(id: str, *, address: str, on_event: OnEvent = ignore) -> RunResult:
    """Stays with a submitted job to its end; what it came to, as `run` would have returned it.

    Raises:
        RaypeftError: what ended the job there.
        RunError: it ended without a result.
    """
    pieces = wiring.jobs_api().logs(id, address, follow=True)
    result, error, last = wiring.read_output(pieces, on_event)
    if error is not None:
        raise error
    if result is None:
        state = wiring.jobs_api().status(id, address)
        raise RunError(
            f"job '{id}' ended without a result ({state.status}): {last or state.message}",
            hint=f"Its log: raypeft logs {id} --address {address}",
        )
    return RunResult.from_dict(result)


def _remote(address: str | None, cluster: str | None, job: LoadedJob) -> Cluster:
    where = _cluster(cluster, job)
    if address:
        return where.at(address)
    if where.kind == "local":
        raise ClusterError(
            "submit sends a job to a Ray cluster, and none is named.",
            hint="Say --address http://HOST:8265, or name a cluster file; on this machine use: raypeft run.",
        )
    return where


# the registry


def registry_url(cluster: str | None = None) -> str:
    """Which registry a command reads."""
    return load_cluster(cluster).registry


def adapters(*, cluster: str | None = None) -> list[AdapterRow]:
    """One row an adapter."""
    return _registry(cluster).adapters()


def versions(name: str, *, cluster: str | None = None) -> list[AdapterVersion]:
    """An adapter's versions, the oldest first.

    Raises:
        RegistryError: there is no such adapter.
    """
    registry = _registry(cluster)
    found = registry.versions(name)
    if not found:
        if "@" in name:
            raise RegistryError(f"'{name}' names one version.", hint=f"See it: raypeft show {name}")
        check_name(name)
        registry.resolve(f"{name}@1")
    return found


def show(ref: str, *, cluster: str | None = None) -> AdapterVersion:
    """A version with its lineage."""
    return _registry(cluster).get(ref)


def alias(ref: str, alias: str, *, cluster: str | None = None) -> AdapterVersion:
    """Points `alias` at a version; endpoints follow within about a second."""
    registry = _registry(cluster)
    name, version = registry.resolve(ref)
    return registry.set_alias(name, version, alias)


def register(
    source: str, name: str, *, base: str | None = None, cluster: str | None = None
) -> AdapterVersion:
    """Registers an adapter that was trained elsewhere: a directory in HF PEFT's layout or a hub id.

    Args:
        base: its base model; what the adapter's config names where None.

    Raises:
        ModelError: not a whole adapter in safetensors, or its base is not there.
    """
    with wiring.adapter_folder(source) as folder:
        base_model = base or check_adapter(folder).base_model
        if base_model is None:
            raise ModelError(
                "adapter_config.json names no base_model_name_or_path.",
                where=source,
                hint="Say it: --base MODEL",
            )
        lineage = Lineage(base_identity(base_model), origin=f"registered from {source}")
        return _registry(cluster).register(name, folder, lineage)


def pull(ref: str, directory: str | Path, *, cluster: str | None = None) -> AdapterVersion:
    """Copies a version into a new directory, checked against its hashes."""
    return _registry(cluster).pull(ref, directory)


def merge(
    ref: str,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    workers: int | None = None,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    cluster: str | None = None,
    on_event: OnEvent = ignore,
) -> MergeResult:
    """Writes an adapter's base with the adapter in its weights as a complete Hugging Face model, without loading
    either: the base's files are read and written layer by layer, by tasks of the local Ray.

    Args:
        ref: NAME@V of the registry, or a directory, URL or hub id of an adapter.
        out: a directory or URL that is not there yet; it appears when it is whole.
        base: in the place of the base that the adapter was trained on.
        dtype: of the weights, such as `bfloat16`; None: as the base has them.
        workers: at most so many tasks; None: by the machine's processors. Memory may allow fewer.
        max_shard_size: of one file, such as `5GB`.
        trust_remote_code: run the Python code that comes with the base.

    Raises:
        RegistryError: there is no such version.
        ModelError: the adapter cannot be merged, or the base is not there or another one.
        StorageError: `out` is taken or cannot be written.
        PlacementError: there is no memory for one worker.
    """
    where = load_cluster(cluster)
    check_out(out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_terminated_as_interrupted())
        adapter = stack.enter_context(_adapter_to_merge(ref, cluster))
        ours = load_cluster("local") if where.is_remote else where
        was_up = _is_up(ours)

        def write_files(*arguments: Any) -> dict[str, Any]:
            return wiring.merge_files(where)(*arguments)

        try:
            return merge_adapter(
                adapter,
                str(out),
                write_files,
                base=base,
                dtype=dtype,
                workers=workers,
                max_shard_size=max_shard_size,
                trust_remote_code=trust_remote_code,
                on_event=on_event,
            )
        finally:
            if not _stays_up(ours, was_up):
                _leave(ours)
            wiring.disconnect()


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Within the context SIGTERM ends what runs as Ctrl-C does: what was half-made is taken away."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread: signals are the program's own business
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _adapter_to_merge(ref: str, cluster: str | None) -> Iterator[AdapterToMerge]:
    """The adapter, its files on this machine while within."""
    if "@" not in ref or Path(ref).expanduser().is_dir() or "://" in ref:
        with wiring.adapter_folder(ref) as folder:
            checked = check_adapter(folder)
            method = checked.config["peft_type"]
            yield AdapterToMerge(ref, folder.absolute(), None, None, checked.base_model, method)
        return
    version = _registry(cluster).get(ref)
    with wiring.adapter_folder(version.url) as folder:
        method, base = check_adapter(folder).config["peft_type"], version.lineage.base
        yield AdapterToMerge(version.ref, folder.absolute(), version.content_hash, base, None, method)


def delete(ref: str, *, cluster: str | None = None) -> None:
    """Deletes a version that no alias and no endpoint holds."""
    _registry(cluster).delete(ref)


def evaluate(
    ref: str,
    data: str,
    *,
    type: str = "chat",
    metrics: Sequence[str] = (),
    max_rows: int | None = None,
    max_new_tokens: int = 64,
    cluster: str | None = None,
) -> dict[str, float]:
    """Measures a version on data, in this process: its metrics, and the bare base's as `base.NAME`."""
    _check_measured(type, metrics)
    version = _registry(cluster).get(ref)
    dataset = {"path": data, "type": type}
    measured: dict[str, Any] = {
        "datasets": [dataset],
        "metrics": list(metrics),
        "max_new_tokens": max_new_tokens,
    }
    if max_rows is not None:
        measured["max_rows"] = max_rows
    spec = load_job_mapping(
        {
            "name": version.name,
            "model": {
                "base_model": version.lineage.base.source,
                "revision": version.lineage.base.revision or "main",
            },
            "data": {"datasets": [dataset], "val_set_size": 0},
            "eval": measured,
        },
        source="raypeft eval",
    ).spec
    with wiring.adapter_folder(version.url) as folder:
        return wiring.evaluate(spec, str(folder))


def _check_measured(type: str, metrics: Sequence[str]) -> None:
    """Raises SpecError in the words of `raypeft eval`, which has no job whose keys could be named."""
    if type not in TASKS:
        near = closest(type, TASKS)
        hint = f"Closest: '{near[0]}'." if near else None
        raise SpecError(f"'{type}' is none of {', '.join(TASKS)}.", where="--type", hint=hint)
    for name in metrics:
        if name not in TASKS[type].metrics:
            raise SpecError(
                f"'{name}' is not measured of rows of type '{type}'.",
                where="--metric",
                hint=f"Of those: {', '.join(TASKS[type].metrics)}.",
            )


# serving


def deploy(
    ref: str,
    *,
    endpoint: str | None = None,
    alias: str = "production",
    num_replicas: int | None = None,
    force: bool = False,
    settings: Sequence[str] = (),
    cluster: str | None = None,
    on_event: OnEvent = ignore,
) -> Deployment:
    """Serves a version at the endpoint of its base, which is started where there is none.

    Args:
        settings: keys of a job's `deploy`, such as `rollout.canary_percent=10` or `scale.min_replicas=0`.

    On a cluster that is reached through Ray's Jobs API this is a short job there, with the same events, result
    and errors.

    Raises:
        RegistryError: there is no such version.
        ModelError: its base is not where the cluster can read it.
        ServeError: its gate refused it, no endpoint answers for its task, or the endpoint does not come up.
    """
    where = load_cluster(cluster)
    wiring.check_registry(where)
    environment = _environment(where)
    version = environment.registry.get(ref)
    service.served_task(version)  # before anything is started
    spec = _deploy_spec(settings, endpoint=endpoint, alias=alias, num_replicas=num_replicas)
    base = version.lineage.base
    was_up = _is_up(where)
    try:
        return environment.open_endpoints().deploy(
            version, base.source, base.revision or "main", spec, force=force, on_event=on_event
        )
    except BaseException:
        if not was_up:
            _leave(where)
        raise


def _deploy_spec(settings: Sequence[str], **asked: Any) -> DeploySpec:
    """What was asked for on the command line, checked as in a job."""
    for each in settings:
        if not each.partition("=")[1]:
            raise SpecError(
                f"'{each}' is not KEY=VALUE.",
                where="--set",
                hint="Write --set KEY=VALUE, such as --set rollout.canary_percent=10.",
            )
    keys = [f"deploy.{each.strip().removeprefix('deploy.')}" for each in settings]
    tree, errors = apply_overrides(Tree("--set"), keys)
    if errors:
        raise errors[0]
    said = {key: value for key, value in asked.items() if value is not None}
    values = {**said, **tree.values.get("deploy", {})}
    if "gate" in values:
        raise SpecError(
            "a gate is asked when a version is registered, not when it is deployed.",
            where="deploy.gate",
            hint="Write it in the job; --force deploys what it refused.",
        )
    try:
        spec = DeploySpec(**values)
    except ValidationError as error:
        problem = explain(DeploySpec, values, error.errors(), _unknown_of_deploy)[0]
        where = f"deploy.{dotted(problem.path)}"
        raise SpecError(problem.problem, where=where, hint=problem.hint) from error
    for problem in check_deploy(spec):
        raise SpecError(problem.problem, where=dotted(problem.path), hint=problem.hint)
    return spec


def _unknown_of_deploy(path: SpecPath) -> Problem:
    """What to say of a key below `deploy` that does not exist, at its place below it."""
    found = unknown_key(("deploy", *path))
    return Problem(path, found.problem, found.hint)


def endpoints(*, cluster: str | None = None) -> list[EndpointInfo]:
    """All endpoints with what they serve. Starts no Ray: without one they are shown as down."""
    return wiring.endpoint_rows(load_cluster(cluster))


def promote(ref: str, *, alias: str | None = None, cluster: str | None = None) -> tuple[str, str]:
    """Gives a served version its alias now; returns the endpoint and what took it (`NAME@V`).

    Args:
        alias: that of its rollout, else `production`.

    Raises:
        RegistryError: there is no such version.
        ServeError: no endpoint serves it.
    """
    registry = _registry(cluster)
    name, number = registry.resolve(ref)
    return promotion.promote(registry, f"{name}@{number}", alias), f"{name}@{number}"


def rollback(name: str, *, alias: str = "production", cluster: str | None = None) -> tuple[str, str | None]:
    """Takes back what is being rolled out to an alias, else gives the alias to the version before it; returns the
    endpoint and what the alias names now.

    Raises:
        ServeError: nothing is rolled out, and no version before is known.
    """
    registry = _registry(cluster)
    endpoint, number = promotion.rollback(registry, name.partition("@")[0], alias)
    return endpoint, None if number is None else f"{name.partition('@')[0]}@{number}"


def rollouts(name: str | None = None, *, cluster: str | None = None) -> list[traffic.RolloutRow]:
    """What is being rolled out, of one adapter or of all, with the numbers that decide it."""
    return traffic.rollout_rows(_registry(cluster), name)


def audit(name: str | None = None, *, cluster: str | None = None) -> list[dict[str, Any]]:
    """Every step of every rollout, of one adapter or of all, oldest first."""
    return traffic.audit_lines(_registry(cluster), name)


def top(*, cluster: str | None = None) -> Iterator[list[traffic.TrafficRow]]:
    """What each version answers, looked at again for each `next`; from the second on with rates."""
    registry, before = _registry(cluster), None
    while True:
        rows, before = traffic.traffic_rows(registry, before)
        yield rows


def undeploy(name: str, *, endpoint: str | None = None, cluster: str | None = None) -> None:
    """Takes an endpoint out of service, or one adapter (`NAME@V`) wherever it is served.

    Args:
        endpoint: take `NAME@V` from this endpoint alone.
    """
    where = load_cluster(cluster)
    wiring.check_registry(where)
    there = wiring.endpoints(where, Registry(where.registry), start=False)
    if endpoint is not None:
        there.undeploy(endpoint, name)
        return
    if "@" not in name:
        there.undeploy(name)
        return
    served = [
        row.name for row in endpoints(cluster=cluster) if any(a.split(" ")[0] == name for a in row.adapters)
    ]
    if not served:
        raise ServeError(f"no endpoint serves '{name}'.", hint="List them: raypeft endpoints")
    for each in served:
        there.undeploy(each, name)


def ask(
    model: str,
    question: str,
    *,
    max_tokens: int = 128,
    context: str | None = None,
    task_id: int | None = None,
    url: str | None = None,
    cluster: str | None = None,
) -> str:
    """An adapter's, or a bare base's, answer to one question; of labels, entities, spans and vectors, in words. Its key
    is RAYPEFT_API_KEY, or one lent by the registry.

    Args:
        context: the text that answers the question, or the second of two texts, where the endpoint reads such.
        task_id: which is meant of the tasks that an adapter learned.
    """
    there, key = _place_to_ask(model, url, cluster)
    asked: dict[str, Any] = {"key": key, "context": context, "task_id": task_id}
    return asking.ask(there, model, question, max_tokens=max_tokens, **asked)


def ask_head(
    model: str,
    question: str,
    *,
    context: str | None = None,
    task_id: int | None = None,
    url: str | None = None,
    cluster: str | None = None,
) -> dict[str, Any] | None:
    """The same of an endpoint that does not generate: its labels, entities, spans or vector; else None."""
    there, key = _place_to_ask(model, url, cluster)
    return asking.ask_head(there, model, question, key=key, context=context, task_id=task_id)


def ask_stream(
    model: str,
    question: str,
    *,
    max_tokens: int = 128,
    context: str | None = None,
    task_id: int | None = None,
    url: str | None = None,
    cluster: str | None = None,
) -> Iterator[str]:
    """Likewise, piece by piece as it is generated."""
    there, key = _place_to_ask(model, url, cluster)
    asked: dict[str, Any] = {"key": key, "context": context, "task_id": task_id}
    return asking.ask_stream(there, model, question, max_tokens=max_tokens, **asked)


def _place_to_ask(model: str, url: str | None, cluster: str | None) -> tuple[str, str | None]:
    """An endpoint's URL and a key for one question: one that was named by its URL may follow another registry."""
    if url:
        return url, os.environ.get("RAYPEFT_API_KEY")
    return _url_of(model, cluster), _key(_registry(cluster))


def _key(registry: Registry) -> str | None:
    """The key to ask a registry's endpoints with: the environment's, or, where keys are asked for, a short-lived one:
    who writes the registry may ask what it serves."""
    if said := os.environ.get("RAYPEFT_API_KEY"):
        return said
    book = KeyBook(registry.url)
    return None if book.read().is_empty else book.lend()


def create_key(
    tenant: str,
    limits: Mapping[str, Any] | None = None,
    *,
    expires_s: float | None = None,
    force: bool = False,
    cluster: str | None = None,
) -> NewKey:
    """Makes a key for a tenant of the registry's endpoints; its `secret` is seen this once.

    Args:
        limits: fields of `keys.Limits` to change for the tenant, all its keys included.
        expires_s: seconds after which it opens nothing.
        force: take models of the limits that are not there yet.

    Raises:
        RegistryError: the name cannot be a tenant's, or nothing is called like one of the models.
    """
    wiring.check_registry(load_cluster(cluster))
    registry = _registry(cluster)
    if models := (limits or {}).get("models"):
        check_askable(registry, models, force=force)
    return KeyBook(registry.url).create(tenant, dict(limits or {}), expires_s=expires_s)


def keys(*, cluster: str | None = None) -> list[KeyRow]:
    """Every key, the oldest first, with its tenant's limits."""
    return KeyBook(_registry(cluster).url).rows()


def revoke_key(name: str, *, cluster: str | None = None) -> list[str]:
    """Ends a key (by its id), or all keys of a tenant; returns their ids."""
    return KeyBook(_registry(cluster).url).revoke(name)


def used(tenant: str, *, cluster: str | None = None) -> dict[str, int]:
    """Tokens that a tenant has used today, this month and in all."""
    used = Spending(_registry(cluster).url).read(tenant)
    return {period: used.tokens_in(period, time.time()) for period in PERIODS}


def _url_of(model: str, cluster: str | None) -> str:
    """The endpoint that answers to `model`."""
    where = load_cluster(cluster)
    rows = [row for row in endpoints(cluster=cluster) if row.state == "live"]
    if not rows:
        raise ServeError("no endpoint is up.", where=where.registry, hint="Start one: raypeft deploy NAME@V")
    if len(rows) == 1:
        return rows[0].url
    name = model.partition("@")[0]
    for row in rows:
        if model in (row.name, row.base) or any(
            adapter.partition("@")[0] == name for adapter in row.adapters
        ):
            return row.url
    raise ServeError(
        f"none of the {len(rows)} endpoints serves '{model}'.",
        hint=f"They serve: {', '.join(adapter for row in rows for adapter in (row.base, *row.adapters))}.",
    )


# the local Ray


def up(*, num_cpus: int | None = None) -> local_ray.LocalRay:
    """Starts this machine's own Ray in the background, on loopback; returns the one that is up."""
    return local_ray.ensure_up(num_cpus)


def down() -> bool:
    """Stops it with its endpoints, and no other; returns whether there was one."""
    return local_ray.down()


# inside


def _cluster(cluster: str | None, job: LoadedJob) -> Cluster:
    beside = Path(job.path).parent if Path(job.path).exists() else None
    return load_cluster(cluster, job.spec.cluster, beside=beside)


def _environment(cluster: Cluster, job: LoadedJob | None = None) -> service.Environment:
    return wiring.environment(cluster, storage=job.spec.storage.path if job else None)


def _stored_run(id: str, cluster: str | None) -> tuple[RunStore, str]:
    """Where a run is stored, and its id there."""
    folder, slash, name = id.rstrip("/").rpartition("/")
    return (RunStore(folder or "/"), name) if slash else (_environment(load_cluster(cluster)).runs, id)


def _registry(cluster: str | None) -> Registry:
    return Registry(load_cluster(cluster).registry)
