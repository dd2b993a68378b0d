"""Runs: driven here, looked at, cancelled."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .. import ask as asking
from .. import local_ray, service, wiring
from ..cluster import load_cluster
from ..errors import RunError, ServeError
from ..processes import is_alive
from ..registry import Registry
from ..runner import Event
from ..service import OnEvent, RunResult
from ..spec.secrets import read_secrets
from ..store import RunRecord
from ..sweep.result import SweepResult, read_sweep
from .asked import key_of
from .found import JobSource, cluster_of, environment_of, ignore, load, stored_run
from .own_ray import is_up, leave, stays_up
from .signals import handled

CANCEL_S = 40.0
"""A run leaves within 30 s of being asked to."""


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
    where = cluster_of(cluster, loaded)
    was_up = is_up(where)
    environment = environment_of(where, loaded)
    secrets = read_secrets(loaded)
    for warning in loaded.warnings:
        on_event({"event": "warning", "message": warning})
    stop = service.StopRequest()
    try:
        with handled((signal.SIGINT, signal.SIGTERM), stop.ask):
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
        stays = stays_up(where, was_up) or leave(where)
        wiring.disconnect()
    why = (
        "another command, which ends it"
        if local_ray.is_left()
        else "the endpoint; end both with: raypeft down"
    )
    notes = (f"Ray stays up for {why}",) if stays and not was_up else ()
    return replace(result, notes=(*result.notes, *notes))


def _with_answers(result: RunResult, registry: Registry) -> RunResult:
    """Asks the base and the adapter one and the same question, where the endpoint answers."""
    endpoint, question = result.endpoint, result.question
    if endpoint is None or endpoint.state != "live":
        return result
    key = key_of(registry)
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
    return environment_of(load_cluster(cluster)).runs.list()


def status(id: str, *, cluster: str | None = None) -> RunRecord:
    """One stored run by its id, a part of it, or the job's name; by its folder's URL where a job's `storage.path` has
    it elsewhere. Needs no cluster."""
    runs, name = stored_run(id, cluster)
    return runs.get(name)


def sweep(id: str, *, cluster: str | None = None) -> SweepResult:
    """A sweep's trials as they stand, under way or ended, by what `status` takes. Needs no cluster.

    Raises:
        RunError: there is no such run, or its job has no sweep.
    """
    return read_sweep(status(id, cluster=cluster))


def logs(id: str, *, follow: bool = False, cluster: str | None = None) -> Iterator[Event]:
    """A run's events; with `follow` until it has ended."""
    runs, name = stored_run(id, cluster)
    return runs.events(name, follow=follow)


def worker_log(id: str, worker: int, *, follow: bool = False, cluster: str | None = None) -> Iterator[str]:
    """What one worker printed."""
    runs, name = stored_run(id, cluster)
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
    runs, name = stored_run(id, cluster)
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
