"""The use cases. Everything that reaches Ray comes in through `Environment` as a protocol, so that each case
runs in a test without a cluster."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .cluster import Cluster, ClusterFacts
from .errors import Interrupted, RaypeftError, RegistryError
from .gate import check, names_in
from .identity import BaseIdentity, base_identity, data_hash
from .lineage import Lineage, count_trained_on, row_hashes
from .model_sizes import read_sizes
from .objects import get_tree, read
from .plan import Plan, make_plan
from .registry import AdapterVersion, Registry
from .runner import Event, Runner, TrainOutcome, TrainRequest
from .spec.canonical import canonical_hash, resolved_yaml
from .spec.job import DeploySpec, JobSpec
from .store import Run, RunStore

OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Deployment:
    """Where an adapter answers. `state` is `live`, or `waiting` for room on the cluster."""

    endpoint: str
    url: str
    model: str
    base_model: str
    state: str = "live"


class Endpoints(Protocol):
    """What the service asks of whatever serves."""

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
        """Finds or starts the endpoint of the version's base and has it serve the version."""

    def status(self) -> list[Any]:
        """All endpoints, with what they serve."""

    def undeploy(self, name: str, adapter: str | None = None) -> None:
        """Takes one adapter, or the whole endpoint, out of service."""


@dataclass(frozen=True)
class Environment:
    """One cluster with its storage: what each use case works on."""

    cluster: Cluster
    runs: RunStore
    registry: Registry
    open_runner: Callable[[], Runner]
    open_endpoints: Callable[[], Endpoints]
    facts: Callable[[], ClusterFacts | None]


@dataclass(frozen=True)
class RunResult:
    """What a job came to."""

    job: str
    state: str
    """done | registered, not deployed | registered, refused by the gate | registered, waiting to deploy"""
    adapter: str | None
    metrics: dict[str, float] = field(default_factory=dict)
    endpoint: Deployment | None = None
    first_step_s: float | None = None
    wall_s: float = 0.0
    reasons: tuple[str, ...] = ()
    already: bool = False
    """True where an earlier run of the same job had done it all."""

    def to_dict(self) -> dict[str, Any]:
        """The last JSON object of `raypeft run --json`."""
        return asdict(self) | {"endpoint": self.endpoint.url if self.endpoint else None}


def plan_job(spec: JobSpec, environment: Environment) -> Plan:
    """The plan that `run` follows.

    Raises:
        ModelError: the base does not exist or its weights are damaged.
        PlacementError: the cluster can never give what the job asks.
    """
    sizes = read_sizes(spec.model.base_model, spec.model.revision)
    return make_plan(spec, environment.facts(), sizes)


def run_job(
    spec: JobSpec,
    environment: Environment,
    *,
    secrets: dict[str, str] | None = None,
    new: bool = False,
    resume: bool = False,
    force: bool = False,
    on_event: OnEvent = lambda event: None,
) -> RunResult:
    """Trains, gates, registers and deploys; goes on where an earlier attempt stopped.

    Args:
        new: number a new run where the name is taken by another spec.
        resume: take over the run of this name although keys that may change did.
        force: deploy although the gate refuses; recorded.

    Raises:
        RaypeftError: the leaf says what failed; the run's folder keeps the cause.
        Interrupted: Ctrl-C; the run was checkpointed and the same command resumes it.
    """
    began = time.time()
    plan = plan_job(spec, environment)
    base = base_identity(spec.model.base_model, spec.model.revision)
    run = environment.runs.open(spec.name, spec, data_hash(spec), new=new, resume=resume)
    with run:
        emit = _recorder(run, on_event)
        try:
            result = _finish(spec, plan, base, run, environment, secrets or {}, force, emit)
        except KeyboardInterrupt as stop:
            run.set_state("interrupted")
            raise Interrupted(
                f"run '{run.id}' was interrupted.", hint="The same command goes on from its last checkpoint."
            ) from stop
        except RaypeftError as error:
            state = "interrupted" if isinstance(error, Interrupted) else "failed"
            run.set_state(state, cause=str(error))
            raise
        wall_s = time.time() - began
        return RunResult(**{**result, "job": run.id, "wall_s": round(wall_s, 3)})


def _recorder(run: Run, on_event: OnEvent) -> OnEvent:
    """Keeps each event in the run's folder, then shows it."""

    def emit(event: Event) -> None:
        event = {"t": round(time.time(), 3), **event}
        if event["event"] in ("progress", "eval"):
            run.append_metrics(event)
        if event["event"] != "progress":
            run.append_event(event)
        on_event(event)

    return emit


def _finish(
    spec: JobSpec,
    plan: Plan,
    base: BaseIdentity,
    run: Run,
    environment: Environment,
    secrets: dict[str, str],
    force: bool,
    emit: OnEvent,
) -> dict[str, Any]:
    """The stages that this run still lacks; each leaves a record, so that a killed run repeats none."""
    first_step_s = None
    version = _registered(spec, run, environment.registry)
    if version is not None and run.record.state == "done":
        endpoint = run.record.endpoint
        deployment = Deployment(**endpoint) if isinstance(endpoint, dict) else None
        emit({"event": "state", "state": "done", "message": f"done: {version.ref}"})
        return {
            "state": "done", "adapter": version.ref, "metrics": run.record.metrics, "endpoint": deployment,
            "already": True,
        }  # fmt: skip
    if version is None:
        outcome = _train(spec, plan, base, run, environment, secrets, emit)
        first_step_s = outcome.first_step_s
        version = _register(spec, base, run, outcome, environment.registry, emit)
    metrics = version.lineage.metrics
    reasons = tuple(version.lineage.gate_reasons)
    facts: dict[str, Any] = {
        "adapter": version.ref, "metrics": metrics, "first_step_s": first_step_s, "reasons": reasons,
    }  # fmt: skip
    if spec.deploy is None:
        return facts | {"state": _settle(run, emit, "done", f"done: {version.ref}", version)}
    if not version.lineage.gate_passed and not force:
        message = f"{version.ref} is registered, not deployed: the gate refused it"
        return facts | {"state": _settle(run, emit, "registered, refused by the gate", message, version)}
    emit({"event": "state", "state": "deploying", "message": f"deploying {version.ref}"})
    deployment = environment.open_endpoints().deploy(
        version, spec.model.base_model, spec.model.revision, spec.deploy, force=force, on_event=emit
    )
    state = "done" if deployment.state == "live" else "registered, waiting to deploy"
    message = f"{version.ref} answers at {deployment.url}" if state == "done" else f"{version.ref}: {state}"
    return facts | {"state": _settle(run, emit, state, message, version, deployment), "endpoint": deployment}


def _settle(
    run: Run,
    emit: OnEvent,
    state: str,
    message: str,
    version: AdapterVersion,
    deployment: Deployment | None = None,
) -> str:
    run.set_state(
        state,
        adapter=version.ref,
        metrics=version.lineage.metrics,
        endpoint=asdict(deployment) if deployment else None,
    )
    emit({"event": "state", "state": state, "message": message})
    return state


def _registered(spec: JobSpec, run: Run, registry: Registry) -> AdapterVersion | None:
    """The version that an earlier attempt of this run registered, also where it died before saying so."""
    name = spec.register_.name or spec.name
    for version in reversed(registry.versions(name)):
        if version.lineage.run_id == run.id:
            return version
    return None


def _train(
    spec: JobSpec,
    plan: Plan,
    base: BaseIdentity,
    run: Run,
    environment: Environment,
    secrets: dict[str, str],
    emit: OnEvent,
) -> TrainOutcome:
    production = _production(spec, environment.registry)
    if production is not None and production.lineage.base.content_hash != base.content_hash:
        emit({"event": "warning", "message": f"{production.ref} belongs to another base: not compared with"})
        production = None
    request = TrainRequest(
        spec=spec,
        plan=plan,
        run_dir=run.url,
        run_id=run.id,
        data_hash=run.record.data_hash,
        init_from=_init_from(spec, base, environment.registry),
        compare={"production": production.url} if production else {},
        secrets=secrets,
    )
    run.set_state("starting")
    emit({"event": "state", "state": "starting", "message": f"run {run.id}: {_layout(plan)}"})
    runner = environment.open_runner()
    runner.start(request)
    for event in _until_end(runner):
        emit(event)
    return runner.outcome()


def _layout(plan: Plan) -> str:
    kind = "GPU" if plan.use_gpu else "CPU"
    plural = "" if plan.num_workers == 1 else "s"
    return f"{plan.num_workers} {kind} worker{plural}, ZeRO-{plan.zero_stage}, {plan.global_batch_size} rows a step"


def _until_end(runner: Runner) -> Iterator[Event]:
    """The runner's events; a first Ctrl-C asks it to stop and waits, a second leaves at once."""
    stopped = False
    events = runner.events()
    while True:
        try:
            yield from events
            break
        except KeyboardInterrupt:
            if stopped:
                raise
            stopped = True
            yield {"event": "state", "state": "interrupted", "message": "stopping: saving a checkpoint first"}
            runner.stop()
            events = runner.events()


def _production(spec: JobSpec, registry: Registry) -> AdapterVersion | None:
    """The version that the gate compares with: the holder of the deployment's alias."""
    if spec.deploy is None or not any(name.startswith("production.") for name in names_in(spec.deploy.gate)):
        return None
    name = spec.register_.name or spec.name
    number = registry.alias(name, spec.deploy.alias)
    return registry.get(f"{name}@{number}") if number is not None else None


def _init_from(spec: JobSpec, base: BaseIdentity, registry: Registry) -> str | None:
    source = spec.adapter.init_from
    if source is None or "@" not in source or Path(source).exists():
        return source
    version = registry.get(source)
    if version.lineage.base.content_hash != base.content_hash:
        raise RegistryError(
            f"adapter.init_from: {version.ref} was trained on {version.lineage.base.name}, this job's base is {base.name}.",
            hint="Name an adapter of the same base.",
        )
    return version.url


def _register(
    spec: JobSpec, base: BaseIdentity, run: Run, outcome: TrainOutcome, registry: Registry, emit: OnEvent
) -> AdapterVersion:
    name = spec.register_.name or spec.name
    production = _production(spec, registry)
    verdict = check(
        spec.deploy.gate if spec.deploy else None, outcome.metrics, has_production=production is not None
    )
    for reason in verdict.reasons:
        emit({"event": "state", "state": "gating", "message": f"gate: {reason}"})
    emit({"event": "state", "state": "registering", "message": f"registering {name}"})
    train_rows = row_hashes(read(outcome.train_rows)[0])
    _report_seen_rows(outcome, production, registry, emit)
    lineage = Lineage(
        base=base,
        spec_hash=canonical_hash(spec),
        resolved_spec=resolved_yaml(spec),
        data_hash=run.record.data_hash,
        metrics=outcome.metrics,
        parent=spec.adapter.init_from,
        run_id=run.id,
        gate_passed=verdict.passed,
        gate_reasons=verdict.reasons,
    )
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / "adapter"
        get_tree(outcome.adapter_dir, local)
        version = registry.register(name, local, lineage, train_rows=train_rows)
    if spec.register_.alias:
        registry.set_alias(name, version.version, spec.register_.alias)
    emit({"event": "state", "state": "registered", "message": f"registered {version.ref}"})
    run.set_state("registered", adapter=version.ref, metrics=outcome.metrics)
    return version


def _report_seen_rows(
    outcome: TrainOutcome, production: AdapterVersion | None, registry: Registry, emit: OnEvent
) -> None:
    """Evaluation rows on which the production version was trained flatter it: counted and said."""
    if production is None:
        return
    rows = row_hashes(read(outcome.eval_rows)[0])
    seen = count_trained_on(rows, registry.train_rows(production))
    if seen:
        emit({
            "event": "warning",
            "message": f"{seen} of {len(rows)} evaluation rows were in the training rows of {production.ref}",
        })  # fmt: skip
