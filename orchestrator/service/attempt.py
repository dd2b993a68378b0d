"""One attempt at a run, from whatever it lacks to its end."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutOfTimeError, RaypeftError, RegistryError
from ..gate import check, names_in
from ..identity import BaseIdentity
from ..lineage import Lineage, count_trained_on, row_hashes
from ..objects import get_tree, persistently, read
from ..plan import Plan
from ..registry import AdapterVersion
from ..runner import Runner, TrainOutcome, TrainRequest
from ..spec.canonical import canonical_hash, resolved_yaml
from ..spec.durations import format_duration
from ..spec.job import JobSpec
from ..spec.quantization import quantization_of
from ..spec.trials import starts_of
from ..store import Run
from ..tracking.story import Story
from ..tracking.targets import where_to_look
from .environment import Environment, OnEvent
from .results import Deployment, RunResult
from .stopping import StopRequest


@dataclass
class Attempt:
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
