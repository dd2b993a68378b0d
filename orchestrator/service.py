"""The use cases. Everything that reaches Ray comes in through `Environment` as a protocol, so that each case
runs in a test without a cluster."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from peft_dist.catalog import config_class

from . import adapter_folder
from .cluster import Cluster, ClusterFacts, check_storage
from .errors import (
    HubError,
    Interrupted,
    LeaseError,
    OutOfTimeError,
    RaypeftError,
    RegistryError,
    ServeError,
    StorageError,
)
from .gate import check, names_in
from .identity import BaseIdentity, base_identity, data_hash
from .lineage import Lineage, count_trained_on, row_hashes
from .objects import get_tree, join, persistently, read
from .plan import Plan, make_plan
from .plan.model_sizes import ModelSizes, read_sizes
from .plan.row_lengths import row_facts
from .plan.sweep import SweepPlan, make_sweep_plan
from .registry import AdapterVersion, Registry
from .runner import Event, Runner, TrainOutcome, TrainRequest
from .spec.canonical import canonical_hash, load_stored, resolved_yaml
from .spec.durations import format_duration
from .spec.job import DeploySpec, JobSpec
from .spec.quantization import quantization_of
from .spec.tasks import SERVED, task_type
from .spec.trials import starts_of
from .store import Run, RunStore
from .stored import known
from .tracking.session import Tracking
from .tracking.story import Story
from .tracking.targets import check_tracking, untold, where_to_look

OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Deployment:
    """Where an adapter answers. `state` is `live`, `canary` where it is watched before it takes its alias, or
    `waiting` for room on the cluster."""

    endpoint: str
    url: str
    """Of its OpenAI API: http://HOST:PORT/ENDPOINT/v1."""
    model: str
    """`name@version`."""
    base_name: str
    """What the bare base is called there."""
    state: str = "live"
    rollout: str | None = None
    """How it is watched, in words."""

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


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
    open_sweep: Callable[[], Runner] | None = None
    """What trains a job with a sweep; None: jobs without one alone."""
    open_tracking: Callable[[JobSpec, Mapping[str, str]], Tracking] = lambda spec, secrets: Tracking()
    """The trackers that a job asks for, given its secrets."""


@dataclass(frozen=True)
class Comparison:
    """One question, and what the bare base and the adapter say to it."""

    question: str
    base: str
    adapter: str
    curl: str
    """The shell line that asks the adapter the same."""


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
    question: str | None = None
    """The first question of the evaluation rows."""
    comparison: Comparison | None = None
    notes: tuple[str, ...] = ()
    """What a user should know now, such as that Ray stays up."""
    sweep: dict[str, Any] | None = None
    """Of a sweep: its trials, as `raypeft sweep show --json` prints them."""

    def to_dict(self) -> dict[str, Any]:
        """The last JSON object of `raypeft run --json`."""
        return asdict(self) | {"endpoint": self.endpoint.url if self.endpoint else None}

    @classmethod
    def from_dict(cls, printed: Mapping[str, Any]) -> RunResult:
        """What another process printed; its endpoint is only a URL and is left out."""
        kept = known(cls, printed)
        said = kept.get("comparison")
        comparison = Comparison(**said) if said else None
        lists = {name: tuple(kept.get(name, ())) for name in ("reasons", "notes")}
        return cls(**{**kept, **lists, "endpoint": None, "comparison": comparison})


def plan_job(spec: JobSpec, environment: Environment) -> Plan:
    """The plan that `run` follows; of a sweep, that of the trial that needs most. Where a hub does not answer, it knows
    nothing of the base and says so.

    Raises:
        ModelError: the base does not exist or its weights are damaged.
        PlacementError: the cluster can never give what the job asks.
        ClusterError: it has several nodes without storage that all of them see.
    """
    if spec.sweep is not None:
        return plan_sweep(spec, environment).trial
    facts, sizes, notes = _known_before(spec, environment)
    plan = make_plan(spec, facts, sizes, row_facts(spec))
    return replace(plan, notes=(*notes, *plan.notes))


def plan_sweep(spec: JobSpec, environment: Environment) -> SweepPlan:
    """The plan of a job with a sweep: how many trials, on how many bases, what that takes.

    Raises:
        PlacementError: a trial does not fit, or the cluster can never give its workers. Else as `plan_job`.
    """
    facts, sizes, notes = _known_before(spec, environment)
    plan = make_sweep_plan(spec, facts, sizes, row_facts(spec))
    return replace(plan, notes=(*notes, *plan.notes))


def _known_before(
    spec: JobSpec, environment: Environment
) -> tuple[ClusterFacts | None, ModelSizes | None, list[str]]:
    """What a plan is made from, and what is to be said of it."""
    sizes, notes = None, list[str]()
    try:
        sizes = read_sizes(spec.model.base_model, spec.model.revision)
    except HubError as error:
        notes.append(error.problem)
    facts = environment.facts()
    if facts is not None:
        check_storage(spec, environment.cluster, facts)
    check_tracking(spec, environment.cluster, facts)
    if unsaid := untold(spec, environment.cluster, storage=spec.storage.path):
        notes.append(unsaid)
    return facts, sizes, notes


def task_to_ask(version: AdapterVersion) -> int | None:
    """The task of a question from a job's own rows, whose first dataset is task 0 where its rows do not say; None for
    an adapter that learned no several."""
    raw, _ = read(join(version.url, adapter_folder.CONFIG))
    reads = getattr(config_class(json.loads(raw)["peft_type"]), "reads", ())
    return 0 if isinstance(reads, tuple) and "task_ids" in reads else None


def served_task(version: AdapterVersion) -> str:
    """PEFT's name of what a version was trained for: what its config says, else the job that trained it; text is
    generated by one of which neither says it.

    Raises:
        ServeError: no endpoint answers for that.
    """
    raw, _ = read(join(version.url, adapter_folder.CONFIG))
    task = json.loads(raw).get("task_type")
    if task is None:
        spec = version.lineage.resolved_spec
        return task_type(load_stored(spec)) if spec is not None else "CAUSAL_LM"
    if task not in SERVED:
        raise ServeError(
            f"it was trained for {task}; endpoints answer for {', '.join(SERVED)}.",
            where=version.ref,
            hint=f"Fetch it: raypeft pull {version.ref} DIR",
        )
    return str(task)


class StopRequest:
    """What Ctrl-C asks for. While workers train, the first one has them save a checkpoint and leave; a second
    one, or one at any other time, raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self._asked, self._ended = threading.Event(), threading.Event()
        self._runner: Runner | None = None
        self.came = False
        """Whether it was asked for while workers trained, be it too late for them."""

    def ask(self) -> None:
        """Called by a signal handler, so it only raises or sets a flag."""
        if self._runner is None or self._asked.is_set():
            raise KeyboardInterrupt
        self.came = True
        self._asked.set()

    @contextlib.contextmanager
    def stops(self, runner: Runner) -> Iterator[None]:
        """Within the context, `ask` stops this runner."""
        watcher = threading.Thread(target=self._watch, args=(runner,), name="stop-request", daemon=True)
        self._runner = runner
        watcher.start()
        try:
            yield
        finally:
            self._runner = None
            self._ended.set()
            self._asked.set()

    def _watch(self, runner: Runner) -> None:
        self._asked.wait()
        if not self._ended.is_set():
            runner.stop()


def run_job(
    spec: JobSpec,
    environment: Environment,
    *,
    secrets: dict[str, str] | None = None,
    new: bool = False,
    resume: bool = False,
    force: bool = False,
    on_event: OnEvent = lambda event: None,
    stop: StopRequest | None = None,
) -> RunResult:
    """Trains, gates, registers and deploys; goes on where an earlier attempt stopped.

    Args:
        new: number a new run where the name is taken by another spec.
        resume: take over the run of this name although keys that may change did; what `retry` allows counts anew.
        force: deploy although the gate refuses; recorded.
        stop: through which Ctrl-C asks for a checkpoint.

    Raises:
        RaypeftError: the leaf says what failed; the run's folder keeps the cause.
        Interrupted: it was stopped; the same call goes on from its last checkpoint.
    """
    began = time.time()
    with _in_environment(secrets or {}):  # a private base's or dataset's token
        plan = plan_job(spec, environment)
        base = base_identity(spec.model.base_model, spec.model.revision)
        data = data_hash(spec)
    environment.registry.check_writable()

    def say(text: str) -> None:  # nothing is kept yet: the run is not held
        on_event({"event": "warning", "t": round(time.time(), 3), "message": text})

    with (
        environment.runs.open(spec.name, spec, data, new=new, resume=resume, say=say) as run,
        _tracked(environment, spec, secrets or {}, run) as story,
    ):
        attempt = _Attempt(
            spec,
            plan,
            base,
            run,
            environment,
            secrets or {},
            force,
            emit=_recorder(run, on_event, story),
            show=on_event,
            stop=stop or StopRequest(),
            story=story,
        )
        try:
            result = attempt.finish()
        except KeyboardInterrupt as interrupt:
            run.set_state("interrupted")
            raise Interrupted(
                f"run '{run.id}' was interrupted.", hint="The same command goes on from its last checkpoint."
            ) from interrupt
        except LeaseError:
            raise  # the run is another driver's: its state is not ours to say
        except RaypeftError as error:
            state = "interrupted" if isinstance(error, Interrupted | OutOfTimeError) else "failed"
            run.set_state(state, cause=str(error))
            raise
        notes = tuple(where_to_look(story.tracking, run.id)) if story.run else ()
    for warning in story.tracking.warnings():
        say(warning)
    return replace(result, wall_s=round(time.time() - began, 3), notes=(*result.notes, *notes))


@contextlib.contextmanager
def _tracked(
    environment: Environment, spec: JobSpec, secrets: Mapping[str, str], run: Run
) -> Iterator[Story]:
    """Within the context trackers are told of the run, and after it how it ended."""
    facts = {"raypeft.run_dir": run.url, "raypeft.data_hash": run.record.data_hash}
    with environment.open_tracking(spec, secrets) as tracking:
        story = Story(tracking, run.id, spec, facts)
        try:
            yield story
        except (KeyboardInterrupt, Interrupted, OutOfTimeError, LeaseError):
            story.end("killed")
            raise
        except BaseException:
            story.end("failed")
            raise
        story.end("finished")


@contextlib.contextmanager
def _in_environment(secrets: dict[str, str]) -> Iterator[None]:
    """Within the context the secrets are environment variables of this process; no other process sees them."""
    before = {name: os.environ.get(name) for name in secrets}
    os.environ.update(secrets)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _recorder(run: Run, on_event: OnEvent, story: Story) -> OnEvent:
    """Keeps each event in the run's folder, then shows it and tells the trackers. What the storage does not take now
    waits for the next event: no training ends for a line of its story."""
    has_failed = False

    def emit(event: Event) -> None:
        story.take(event)
        keep(event)
        for warning in story.tracking.warnings():
            keep({"event": "warning", "message": warning})

    def keep(event: Event) -> None:
        nonlocal has_failed
        event = {"t": round(time.time(), 3), **event}
        try:
            _keep(run, event)
        except StorageError as error:
            if not has_failed:
                message = f"events cannot be stored now, and wait: {error}"
                on_event({"event": "warning", "t": event["t"], "message": message})
            has_failed = True
        else:
            has_failed = False
        if event["event"] != "log":  # of interest to `raypeft logs` alone
            on_event(event)

    return emit


def _keep(run: Run, event: Event) -> None:
    if event["event"] == "log":
        run.append_log(event["rank"], event["text"])
        return
    if event["event"] == "progress" and "trial" in event:
        return  # the trial's own run keeps it
    if event["event"] in ("progress", "eval"):
        run.append_metrics(event)
    if event["event"] != "progress":
        run.append_event(event)


@dataclass
class _Attempt:
    """One attempt at a run. Each stage leaves a record, so that the next attempt repeats none."""

    spec: JobSpec
    plan: Plan
    base: BaseIdentity
    run: Run
    environment: Environment
    secrets: dict[str, str]
    force: bool
    emit: OnEvent
    """Keeps an event in the run's folder and shows it."""
    show: OnEvent
    stop: StopRequest
    story: Story
    outcome: TrainOutcome | None = None

    def finish(self) -> RunResult:
        """All stages that the run still lacks."""
        version = self._registered()
        if version is not None and self.run.record.state == "done":
            return self._done_before(version)
        self.story.begin()
        for line in where_to_look(self.story.tracking, self.run.id):
            self._say("starting", line)
        if version is None:
            self.outcome = self._train()
            version = self._register(self.outcome)
        self.story.registered(version.ref, version.url, version.lineage.to_dict())
        if self.spec.deploy is None:
            return self._settle("done", f"done: {version.ref}", version)
        if version.lineage.gate_passed is False and not self.force:
            message = f"{version.ref} is registered, not deployed: the gate refused it"
            return self._settle("registered, refused by the gate", message, version)
        self._say("deploying", f"deploying {version.ref}")
        model = self.spec.model
        deployment = self.environment.open_endpoints().deploy(
            version, model.base_model, model.revision, self.spec.deploy, force=self.force, on_event=self.emit
        )
        if deployment.state == "live":
            return self._settle("done", f"{version.ref} answers at {deployment.url}", version, deployment)
        if deployment.state == "canary":
            message = f"{version.ref} is a canary at {deployment.url}: {deployment.rollout}"
            return self._settle("done", message, version, deployment)
        state = "registered, waiting to deploy"
        return self._settle(
            state, f"{version.ref} is {state}: the cluster has no room yet", version, deployment
        )

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.spec.register_.name or self.spec.name

    def _say(self, state: str, message: str) -> None:
        """Keeps and shows where the attempt is."""
        self.emit({"event": "state", "state": state, "message": message})

    def _enter(self, state: str, message: str, **facts: Any) -> None:
        """Likewise, with what is now known of the run."""
        self.show(self.run.set_state(state, message=message, **facts))

    def _done_before(self, version: AdapterVersion) -> RunResult:
        self.show({"event": "state", "t": time.time(), "state": "done", "message": f"done: {version.ref}"})
        record = self.run.record
        endpoint = Deployment(**record.endpoint) if record.endpoint else None
        question = record.facts.get("question")
        metrics = version.lineage.metrics
        return RunResult(self.run.id, "done", version.ref, metrics, endpoint, already=True, question=question)

    def _settle(
        self, state: str, message: str, version: AdapterVersion, deployment: Deployment | None = None
    ) -> RunResult:
        metrics = version.lineage.metrics
        endpoint = deployment.to_dict() if deployment else None
        self._enter(state, message, adapter=version.ref, metrics=metrics, endpoint=endpoint)
        return RunResult(
            self.run.id,
            state,
            version.ref,
            metrics,
            deployment,
            first_step_s=self.outcome.first_step_s if self.outcome else None,
            reasons=tuple(version.lineage.gate_reasons),
            question=self.run.record.facts.get("question"),
        )

    def _registered(self) -> AdapterVersion | None:
        """The version that an earlier attempt of this run registered, also where it died before saying so."""
        if self.run.record.state == "registering":  # by a driver that may be cut off and not yet dead
            self.environment.registry.claim(self.name, self.run.training_id, self.run.fence.number)
        mine = (
            v
            for v in self.environment.registry.versions(self.name)
            if v.lineage.run_id == self.run.training_id
        )
        return next(mine, None)

    def _train(self) -> TrainOutcome:
        self._check_time()
        self._say("starting", f"run {self.run.id}: {self._layout()}")
        production = self._production()
        request = TrainRequest(
            spec=self.spec,
            plan=self.plan,
            run_dir=self.run.url,
            run_id=self.run.id,
            data_hash=self.run.record.data_hash,
            init_from=self._start(source) if (source := self.spec.adapter.init_from) else None,
            starts={each: self._start(each) for each in starts_of(self.spec)},
            compare={"production": production.url} if production else {},
            secrets=self.secrets,
            fence=self.run.fence,
            spent=self.run.record.spent,
        )
        runner = self._runner()
        with self.run.on_the_clock():
            runner.start(request)
            with self.stop.stops(runner):
                self._follow(runner)
        outcome = runner.outcome()
        if self.stop.came:  # when all steps were done: what is left is for the next attempt
            raise KeyboardInterrupt
        return outcome

    def _runner(self) -> Runner:
        if self.spec.sweep is None or self.environment.open_sweep is None:
            return self.environment.open_runner()
        return self.environment.open_sweep()

    def _check_time(self) -> None:
        """Raises OutOfTimeError where the drivers before have used up all of `retry.max_duration`."""
        limit, used = self.spec.retry.max_duration, self.run.record.spent.seconds
        if limit is not None and used >= limit:
            raise OutOfTimeError(
                f"run '{self.run.id}' has been under way for {format_duration(round(used))}: retry.max_duration "
                f"({format_duration(limit)}) is over.",
                hint=f"Run it again with --resume to go on for {format_duration(limit)} more.",
            )

    def _follow(self, runner: Runner) -> None:
        """Keeps and shows what the workers tell, to their end. They are stopped where it can be kept no more.

        Raises:
            LeaseError: another driver has taken the run over.
        """
        self.run.when_lost(runner.stop)
        try:
            for event in runner.events():
                self.emit(event)
                if event["event"] == "failure" and event["will_retry"]:
                    self.run.note_retry(event["kind"])
        except RaypeftError:
            runner.stop()
            for _ in runner.events():
                pass
            raise
        finally:
            self.run.when_lost(lambda: None)
        self.run.check_held()

    def _layout(self) -> str:
        plan = self.plan
        workers = (
            f"{f'{plan.counts[0]} to ' if plan.sizes else ''}{plan.num_workers} "
            f"{'GPU' if plan.use_gpu else 'CPU'} worker{'s' * (plan.num_workers > 1)}"
        )
        return f"{workers}, ZeRO-{plan.zero_stage}, {plan.global_batch_size} rows a step"

    def _production(self) -> AdapterVersion | None:
        """The version that the gate compares with: the holder of the deployment's alias, on the same base."""
        deploy = self.spec.deploy
        if deploy is None or not any(name.startswith("production.") for name in names_in(deploy.gate)):
            return None
        number = self.environment.registry.alias(self.name, deploy.alias)
        if number is None:
            return None
        version = self.environment.registry.get(f"{self.name}@{number}")
        if version.lineage.base.is_same(self.base):
            return version
        self.emit({
            "event": "warning",
            "message": f"{version.ref} ({deploy.alias}) belongs to another base and is not compared with",
        })  # fmt: skip
        return None

    def _start(self, source: str) -> str:
        """Where the adapter is that an `adapter.init_from` names."""
        if "@" not in source or Path(source).exists():
            return source
        version = self.environment.registry.get(source)
        if not version.lineage.base.is_same(self.base):
            raise RegistryError(
                f"{version.ref} was trained on {version.lineage.base.name}, this job's base is {self.base.name}.",
                where="adapter.init_from",
                hint="Name an adapter of the same base.",
            )
        return version.url

    def _register(self, outcome: TrainOutcome) -> AdapterVersion:
        registry, deploy = self.environment.registry, self.spec.deploy
        production = self._production()
        verdict = check(
            deploy.gate if deploy else None, outcome.metrics, has_production=production is not None
        )
        if deploy is not None:
            for reason in verdict.reasons:
                self._say("gating", f"gate: {reason}")
        self._report_seen_rows(outcome, production)
        trained = outcome.spec or self.spec
        lineage = Lineage(
            base=self.base,
            run_id=self.run.training_id,
            spec_hash=canonical_hash(trained),
            resolved_spec=resolved_yaml(trained),
            sweep=dict(outcome.origin),
            data_hash=self.run.record.data_hash,
            quantization=bits.name if (bits := quantization_of(trained.model)) else None,
            metrics=outcome.metrics,
            parent=trained.adapter.init_from,
            gate_passed=verdict.passed if deploy is not None and deploy.gate is not None else None,
            gate_reasons=verdict.reasons if deploy is not None else (),
        )
        with tempfile.TemporaryDirectory() as scratch:
            folder = get_tree(outcome.adapter_dir, Path(scratch) / "adapter")
            rows = row_hashes(read(outcome.train_rows)[0])
            self._enter("registering", f"registering {self.name}")
            fence = self.run.fence.number  # by which a second try finds what the first one did
            version = persistently(
                lambda: registry.register(self.name, folder, lineage, train_rows=rows, fence=fence)
            )
        if self.spec.register_.alias:
            registry.set_alias(self.name, version.version, self.spec.register_.alias)
        self._enter(
            "registered",
            f"registered {version.ref}",
            adapter=version.ref,
            metrics=outcome.metrics,
            question=outcome.question,
        )
        return version

    def _report_seen_rows(self, outcome: TrainOutcome, production: AdapterVersion | None) -> None:
        """Evaluation rows on which a version was trained flatter it: counted and said."""
        rows = row_hashes(read(outcome.eval_rows)[0])
        registry = self.environment.registry
        compared = {production.ref: production} if production else {}
        parent = (outcome.spec or self.spec).adapter.init_from
        if parent and "@" in parent and not Path(parent).exists():
            compared[parent] = registry.get(parent)
        for ref, version in compared.items():
            if seen := count_trained_on(rows, registry.train_rows(version)):
                message = f"{seen} of {len(rows)} evaluation rows were in the training rows of {ref}"
                self.emit({"event": "warning", "message": message})
