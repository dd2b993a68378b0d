"""Deploying, listing and ending endpoints, from a driver that is connected to Ray."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ModelError, PlacementError, ServeError, closest
from ..identity import BaseIdentity, base_identity
from ..keys import KeyBook
from ..registry import AdapterVersion, Registry
from ..runner import Event
from ..service import Deployment, served_task
from ..spec.canonical import load_stored
from ..spec.job import DeploySpec
from . import serve_cluster
from .code_version import version_of
from .desired import Desired, EngineOptions, Served
from .endpoint_calls import authorization, await_alias, await_gone, followed_registry, probe
from .endpoint_rows import EndpointInfo, cause_of, endpoint_info
from .naming import base_id, check_endpoint_name, default_endpoint
from .rollout import Rollout
from .rollouts.promotion import all_desired, change, desired_of, withdraw
from .rollouts.reports import Reports
from .routes.key_check import require_keys
from .serve_cluster import Application, Door, Placement

OnEvent = Callable[[Event], None]

SECONDS_FOR_A_PLACE = 20.0
"""How long a replica may wait for room before the deployment is left to become live by itself."""
_SECONDS_TO_RECOVER = 120.0
_SECONDS_OF_REFUSALS = 15.0
_POLL_S = 0.1
_JOB_FOLDER = "/working_dir_files/"
"""Part of the path of what Ray unpacks for a job alone."""


class RayEndpoints:
    """The endpoints of one cluster. The process must be connected to its Ray.

    Args:
        registry: where adapters and desired states are.
        host, port: where Serve shall listen if none runs yet.
        local: whether the cluster is this machine's own: replicas then reserve nothing, so that training
            finds its workers' places.
        place_timeout_s: seconds after which a replica without a place is reported as waiting.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        local: bool,
        place_timeout_s: float = SECONDS_FOR_A_PLACE,
    ) -> None:
        self._registry, self._host, self._port, self._local = registry, host, port, local
        self._place_timeout_s = place_timeout_s

    def deploy(
        self,
        version: AdapterVersion,
        base_model: str,
        revision: str,
        deploy: DeploySpec,
        *,
        force: bool = False,
        on_event: OnEvent = lambda event: None,
    ) -> Deployment:
        """Has the endpoint of the version's base answer with the version, then points the alias at it. Where
        `deploy.rollout` has it watched, and the alias names a version already, the replicas decide that later.

        Returns with state `canary` where it is watched, `waiting` where the cluster has no room now: the endpoint
        then becomes live, and takes the alias or begins to be watched, by itself.

        Raises:
            ServeError: refused by its gate, another base's endpoint, or it does not come up; nothing changes.
            PlacementError: no node can ever hold a replica.
        """
        _check_gate(version, force)
        base, task = _check_base(version, base_model, revision), served_task(version)
        endpoint = self._choose(base, task, deploy.endpoint)
        placement = self._place(deploy)
        keys = KeyBook(self._registry.url)
        running_door = serve_cluster.find_door()
        require_keys(running_door.host if running_door else self._host, keys.read())
        door = serve_cluster.open_serve(self._host, self._port)
        if door.note:
            on_event({"event": "warning", "message": door.note})
        running = serve_cluster.applications().get(endpoint)
        if running is not None and running.num_running:
            _check_registry(f"{door.url}/{endpoint}", endpoint, self._registry.url)
        entry = Served(version.name, version.version, forced=force and version.lineage.gate_passed is False)
        before = self._record(endpoint, base, task, version, entry, deploy)
        started = False
        try:
            if running is None or running.status in ("DELETING", "NOT_STARTED") or _is_dead(running):
                started = True
                if running is not None and _is_dead(running):
                    placement = _as_many(running, placement, deploy)
                code = self._note_code(endpoint)
                serve_cluster.start_application(endpoint, self._registry.url, placement, code)
            else:
                self._change_running(endpoint, running, placement, deploy, on_event)
            live = self._await(endpoint, version.ref, task, door, on_event)
        except BaseException:
            self._restore(endpoint, before, version.ref)
            if started:
                serve_cluster.delete_application(endpoint)
            elif running is not None:
                self._change_back(endpoint, running)
            raise
        rollout = self._watch(endpoint, version, deploy)
        if rollout is not None:
            pass  # the replicas see to it
        elif live:
            self._give_alias(endpoint, version, deploy.alias, forced=entry.forced)
            await_alias(
                f"{door.url}/{endpoint}", f"{version.name}@{deploy.alias}", version.ref, deploy.bounds[1]
            )
        else:
            change(
                self._registry,
                endpoint,
                lambda now: now.without_promise(version.name, deploy.alias).with_adapter(
                    replace(entry, alias_when_live=deploy.alias)
                ),
            )
        return Deployment(
            endpoint=endpoint,
            url=f"{door.url}/{endpoint}/v1",
            model=version.ref,
            base_name=base_id(base),
            state="waiting" if not live else "canary" if rollout else "live",
            rollout=rollout.describe() if rollout else None,
        )

    def status(self) -> list[EndpointInfo]:
        """All endpoints of this registry or on this cluster, by name."""
        door = serve_cluster.find_door()
        running = serve_cluster.applications()
        desired = all_desired(self._registry)
        return [
            endpoint_info(name, desired.get(name), running.get(name), door, alone=len(running) == 1)
            for name in sorted(desired.keys() | running.keys())
        ]

    def undeploy(self, name: str, adapter: str | None = None) -> None:
        """Takes one adapter (`name@version`, or each version of `name`), or the endpoint, out of service.

        Raises:
            ServeError: there is no such endpoint, or it does not serve that adapter.
        """
        running = serve_cluster.applications()
        desired = all_desired(self._registry)
        if name not in desired and name not in running:
            near = closest(name, desired.keys() | running.keys())
            hint = f"Closest: '{near[0]}'." if near else "List them: raypeft endpoints."
            raise ServeError(f"there is no endpoint '{name}'.", hint=hint)
        if adapter is not None:
            self._withdraw(name, desired.get(name), adapter, name in running)
            return
        if name in running:
            serve_cluster.delete_application(name)
        if name in desired:
            for entry in desired[name].adapters:
                self._registry.release(entry.ref, name)
            self._registry.update_endpoint(name, lambda stored: None)
        self._give_root_to_the_last()

    def _choose(self, base: BaseIdentity, task: str, asked: str | None) -> str:
        """The endpoint for a base's task: the one asked for, else the one that serves it, else a new one.

        Raises:
            ServeError: the one asked for serves another base, or another task.
        """
        desired = all_desired(self._registry)
        if asked is not None:
            check_endpoint_name(asked)
            there = desired.get(asked)
            if there is not None and not there.base.is_same(base):
                raise ServeError(
                    f"endpoint '{asked}' serves the base {there.base.name} ({there.base.content_hash[:8]}), "
                    f"and this adapter belongs to {base.name} ({base.content_hash[:8]}).",
                    where="deploy.endpoint",
                    hint=f"Deploy it to another endpoint, or end this one first: raypeft undeploy {asked}",
                )
            if there is not None and there.task != task:
                raise _other_task(asked, there.task, task)
            return asked
        of_base = [name for name, state in desired.items() if state.base.is_same(base) and state.task == task]
        by_name = default_endpoint(base, desired.keys() - of_base, task)
        if by_name in of_base or len(of_base) != 1:
            return by_name
        return of_base[0]

    def _place(self, deploy: DeploySpec) -> Placement:
        """What a replica reserves.

        Raises:
            PlacementError: no node of this machine's own cluster has that much.
        """
        placement = self._reserved(deploy)
        if deploy.scale is None:
            return placement
        return replace(placement, bounds=deploy.bounds, idle_s=deploy.scale.idle_timeout)

    def _reserved(self, deploy: DeploySpec) -> Placement:
        if self._local and deploy.gpus_per_replica == "auto":
            # It shares what training reserves; Ray leaves the GPUs in sight of who reserves none.
            return Placement(deploy.num_replicas, 0, 0)
        auto = 1.0 if serve_cluster.can_ever_place(0, 1) else 0.0
        gpus = auto if deploy.gpus_per_replica == "auto" else float(deploy.gpus_per_replica)
        cpus = 0.0 if self._local else float(deploy.cpus_per_replica)
        if self._local and not serve_cluster.can_ever_place(cpus, gpus):
            raise PlacementError(
                f"a replica asks for {gpus:g} GPUs, and this machine has fewer.",
                where="deploy.gpus_per_replica",
                hint="Lower it, or leave it at auto.",
            )
        return Placement(deploy.num_replicas, cpus, gpus, hide_gpus=gpus == 0)

    def _watch(self, endpoint: str, version: AdapterVersion, deploy: DeploySpec) -> Rollout | None:
        """Has the version watched before it takes the alias; None: it takes it at once, as does one that takes it from
        nobody. What was on its way to the alias is taken back, unless it is the same version."""
        desired = desired_of(self._registry, endpoint)
        if desired is None:
            raise _undeployed(endpoint)
        under_way = desired.rollout(version.name, deploy.alias)
        if under_way is not None and under_way.ref != version.ref:
            withdraw(self._registry, endpoint, under_way, f"{version.ref} is deployed in its place")
        stable = self._registry.alias(version.name, deploy.alias)
        if (
            not deploy.rollout.is_watched
            or stable in (None, version.version)
            or desired.served(f"{version.name}@{stable}") is None
        ):
            return None
        rollout = Rollout.of(
            deploy.rollout,
            version.name,
            version.version,
            deploy.alias,
            id=secrets.token_hex(6),
            now=time.time(),
        )
        change(self._registry, endpoint, lambda now: now.watching(rollout))
        Reports(self._registry.url, endpoint).note(
            "rollout",
            adapter=rollout.ref,
            alias=rollout.alias,
            rollout=rollout.id,
            stable=stable,
            reasons=[rollout.describe()],
            by="deploy",
        )
        return rollout

    def _record(
        self,
        endpoint: str,
        base: BaseIdentity,
        task: str,
        version: AdapterVersion,
        entry: Served,
        deploy: DeploySpec,
    ) -> Desired | None:
        """Adds a version to the desired state; returns the state before."""
        before = desired_of(self._registry, endpoint)
        if before is not None and not before.base.is_same(base):
            raise ServeError(f"endpoint '{endpoint}' now serves another base.", hint="Deploy again.")
        if before is not None and before.task != task:
            raise _other_task(endpoint, before.task, task)
        threads = max(1, int(deploy.cpus_per_replica))
        options = EngineOptions.of(deploy.engine) if "engine" in deploy.model_fields_set else None

        def add(now: dict[str, Any] | None) -> dict[str, Any]:
            there = Desired.from_dict(now) if now else Desired(endpoint, base, task=task)
            trusts = there.trust_remote_code or _trusts_code(version)
            there = replace(
                there, base=base, threads=threads, trust_remote_code=trusts, engine=options or there.engine
            )
            return there.with_adapter(entry).to_dict()

        reasons = version.lineage.gate_reasons if entry.forced else ()
        self._registry.hold(entry.ref, endpoint, forced=entry.forced, reasons=reasons)
        self._registry.update_endpoint(endpoint, add)
        return before

    def _change_running(
        self,
        endpoint: str,
        running: Application,
        placement: Placement,
        deploy: DeploySpec,
        on_event: OnEvent,
    ) -> None:
        """Gives a running application the number of replicas that is asked for, and this process's code."""
        said = deploy.model_fields_set
        other_number = "num_replicas" in said and deploy.num_replicas != running.num_replicas
        other_number = other_number or (deploy.scale is not None and placement.bounds != running.bounds)
        desired = desired_of(self._registry, endpoint)
        other_code = desired is not None and desired.code != version_of(desired)
        if other_code:
            message = f"endpoint {endpoint}: its replicas are replaced, one after the other, by this code's"
            on_event({"event": "state", "state": "deploying", "message": message})
        if other_number or other_code or running.has_failed:
            wanted = placement if other_number else None
            code = self._note_code(endpoint)
            serve_cluster.change_application(running, self._registry.url, code, placement=wanted)

    def _note_code(self, endpoint: str) -> str:
        """The version of this code with the endpoint's settings, noted as that which it runs."""
        desired = desired_of(self._registry, endpoint)
        if desired is None:
            raise _undeployed(endpoint)
        code = version_of(desired)
        change(self._registry, endpoint, lambda now: replace(now, code=code))
        return code

    def _give_alias(self, endpoint: str, version: AdapterVersion, alias: str, *, forced: bool) -> None:
        before = self._registry.alias(version.name, alias)
        self._registry.set_alias(version.name, version.version, alias)
        change(
            self._registry,
            endpoint,
            lambda now: now.without_promise(version.name, alias).passed(
                version.name, alias, before, version.version
            ),
        )
        why = ["against its gate"] if forced else []
        facts = {"adapter": version.ref, "alias": alias, "before": before, "reasons": why}
        Reports(self._registry.url, endpoint).note("deployed", **facts, by="deploy")

    def _restore(self, endpoint: str, before: Desired | None, ref: str) -> None:
        """Takes a failed deployment back."""
        earlier = before.served(ref) if before else None

        def as_before(now: Desired) -> Desired:
            kept = now.without(ref) if earlier is None else now.with_adapter(earlier)
            return kept if before is None else kept.set_up_as(before)

        if before is None:
            self._registry.update_endpoint(endpoint, lambda stored: None)
        else:
            change(self._registry, endpoint, as_before)
        if earlier is None:
            self._registry.release(ref, endpoint)

    def _change_back(self, endpoint: str, before: Application) -> None:
        """Gives a running application the settings and the number of replicas again that it had."""
        desired, now = desired_of(self._registry, endpoint), serve_cluster.applications().get(endpoint)
        if desired is None or now is None:
            return
        as_many = now.bounds == before.bounds and (now.bounds or now.num_replicas == before.num_replicas)
        if not as_many or desired.code != version_of(desired):
            serve_cluster.change_application(before, self._registry.url, self._note_code(endpoint))

    def _await(self, endpoint: str, ref: str, task: str, door: Door, on_event: OnEvent) -> bool:
        """Waits until the endpoint answers as `ref`; False where its replica has found no place.

        Raises:
            ServeError: Serve gave the application up, or the replica refuses the adapter.
        """
        said, headers = "", authorization(self._registry)
        unplaced, ill, refusing, silent = _Stopwatch(), _Stopwatch(), _Stopwatch(), _Stopwatch()
        while True:
            app = serve_cluster.applications().get(endpoint)
            if app is None:
                raise _undeployed(endpoint)
            # A replica that was killed leaves the application unhealthy until the next one is up.
            if app.has_failed or ill.runs(app.is_recovering) > _SECONDS_TO_RECOVER:
                raise ServeError(f"endpoint '{endpoint}' does not come up: {cause_of(app.message)}")
            if app.num_running or app.is_idle:
                said = _say(on_event, said, f"endpoint {endpoint}: loading {ref}")
                status, message, says_no = probe(f"{door.url}/{endpoint}", ref, task, headers)
                if status == 200:
                    return True
                if status == 400 or refusing.runs(says_no) > _SECONDS_OF_REFUSALS:
                    raise ServeError(f"{ref} is not served: {message}")
                if silent.runs(not says_no) > _SECONDS_TO_RECOVER:
                    why = f": {message}" if message else ""
                    raise ServeError(f"{ref} does not answer for {_SECONDS_TO_RECOVER:g} s{why}")
            else:
                said = _say(on_event, said, f"endpoint {endpoint}: starting a replica")
            if unplaced.runs(_is_unplaced(app)) > self._patience(app):
                _say(on_event, said, f"endpoint {endpoint}: waiting for room on the cluster")
                return False
            time.sleep(_POLL_S)

    def _patience(self, app: Application) -> float:
        """Seconds that a replica may be without a place: more where it seems to be only slow in coming."""
        return self._place_timeout_s * (10 if serve_cluster.has_free(app.actor_options) else 1)

    def _withdraw(self, endpoint: str, desired: Desired | None, adapter: str, is_up: bool) -> None:
        entries = _matching(desired, adapter) if desired else []
        if not entries:
            there = [entry.ref for entry in desired.adapters] if desired else []
            serves = f"It serves {', '.join(there)}." if there else "It serves the bare base only."
            raise ServeError(f"endpoint '{endpoint}' does not serve '{adapter}'.", hint=serves)
        for entry in entries:
            change(self._registry, endpoint, _without(entry.ref))
            self._registry.release(entry.ref, endpoint)
            Reports(self._registry.url, endpoint).note("undeployed", adapter=entry.ref, by="user")
        door = serve_cluster.find_door()
        if is_up and door is not None:
            await_gone(
                f"{door.url}/{endpoint}", {entry.ref for entry in entries}, authorization(self._registry)
            )

    def _give_root_to_the_last(self) -> None:
        """`/v1` belongs to the only endpoint: where one is left, it takes `/` over, in place."""
        running = serve_cluster.applications()
        if len(running) != 1 or serve_cluster.route_taken("/") is not None:
            return
        last = next(iter(running.values()))
        desired = desired_of(self._registry, last.endpoint)
        if desired is not None:
            serve_cluster.change_application(last, self._registry.url, desired.code, route_prefix="/")


def _check_gate(version: AdapterVersion, force: bool) -> None:
    if version.lineage.gate_passed is False and not force:
        reasons = "; ".join(version.lineage.gate_reasons)
        raise ServeError(
            f"the gate refused {version.ref}" + (f": {reasons}." if reasons else "."),
            hint=f"Deploy it all the same with: raypeft deploy {version.ref} --force (it is recorded)",
        )


def _other_task(endpoint: str, there: str, task: str) -> ServeError:
    return ServeError(
        f"endpoint '{endpoint}' has its base loaded for {there}, and this adapter was trained for {task}: a base has "
        "one head.",
        where="deploy.endpoint",
        hint="Deploy it to another endpoint (--endpoint NAME), or leave the name out.",
    )


def _undeployed(endpoint: str) -> ServeError:
    return ServeError(f"endpoint '{endpoint}' was undeployed meanwhile.", hint="Deploy again.")


def _trusts_code(version: AdapterVersion) -> bool:
    """Whether the job that trained a version trusts the code that the base's repository brings."""
    spec = version.lineage.resolved_spec
    return spec is not None and load_stored(spec).model.trust_remote_code


def _check_base(version: AdapterVersion, base_model: str, revision: str) -> BaseIdentity:
    theirs = version.lineage.base
    if Path(base_model).is_absolute() and not Path(base_model).is_dir():
        raise _base_is_gone(version, base_model)
    base = base_identity(base_model, revision)
    if not base.is_same(theirs):
        raise ServeError(
            f"{version.ref} was trained on {theirs.name} ({theirs.content_hash[:8]}), and {base_model} is "
            f"{base.name} ({base.content_hash[:8]}): another base, or one that has changed since.",
            hint="Deploy it on the base that it was trained on.",
        )
    return base


def _base_is_gone(version: AdapterVersion, folder: str) -> ModelError:
    """A base is looked for where the version's lineage says that it was."""
    name, run = version.lineage.base.name, version.lineage.run_id
    came = f"It came with the job of run {run}, and went with it. " if _JOB_FOLDER in folder else ""
    return ModelError(
        f"the base '{name}' of {version.ref} was looked for in {folder} on {socket.gethostname()}, and is not "
        f"there.",
        hint=f"{came}Put the base where every node finds it (PLACE: s3://..., a folder that all mount, a hub id) "
        f"and register the adapter on it: raypeft pull {version.ref} DIR, then raypeft register DIR --name "
        f"{version.name} --base PLACE",
    )


def _check_registry(url: str, endpoint: str, registry_url: str) -> None:
    """Raises ServeError where a running endpoint follows another registry."""
    follows = followed_registry(url, timeout_s=30)
    if follows is not None and follows != registry_url:
        raise ServeError(
            f"endpoint '{endpoint}' on this cluster follows the registry {follows}, this command uses "
            f"{registry_url}.",
            hint="Deploy under another name (--endpoint NAME), or end that one first.",
        )


def _say(on_event: OnEvent, before: str, message: str) -> str:
    if message != before:
        on_event({"event": "state", "state": "deploying", "message": message})
    return message


class _Stopwatch:
    """For how long something has been so without a break."""

    def __init__(self) -> None:
        self._since: float | None = None

    def runs(self, is_so: bool) -> float:
        """Seconds; 0 where it is not so."""
        self._since = (self._since or time.monotonic()) if is_so else None
        return time.monotonic() - self._since if self._since else 0.0


def _is_dead(app: Application) -> bool:
    """Whether Serve has given it up, and nothing of it answers."""
    return app.has_failed and not app.num_running


def _as_many(app: Application, placement: Placement, deploy: DeploySpec) -> Placement:
    """As many replicas as an application was to have, where a deployment says nothing of their number."""
    if {"num_replicas", "scale"} & deploy.model_fields_set:
        return placement
    number = max(1, app.num_replicas)
    return replace(placement, num_replicas=number, bounds=app.bounds, idle_s=app.idle_s)


def _is_unplaced(app: Application) -> bool:
    return bool(app.num_unplaced and not app.num_running)


def _without(ref: str) -> Callable[[Desired], Desired]:
    return lambda now: now.without(ref)


def _matching(desired: Desired, adapter: str) -> list[Served]:
    return [entry for entry in desired.adapters if adapter in (entry.ref, entry.name)]
