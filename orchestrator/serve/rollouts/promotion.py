"""Versions that take aliases and give them back: steps of rollouts, applied to what an endpoint shall serve. Each is
one compare-and-swap of the desired state, so that of two who decide the same only one did it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from orchestrator import stored
from orchestrator.errors import RegistryError, ServeError
from orchestrator.registry import DEFAULT_ALIAS, Registry

from ..desired import Desired, Served
from ..rollout import Rollout, Step
from .reports import Reports


def desired_of(registry: Registry, endpoint: str, *, was_there: bool = False) -> Desired | None:
    """What an endpoint shall serve; None where there is no such endpoint. For `was_there` see
    `Registry.endpoint_state`."""
    state = registry.endpoint_state(endpoint, was_there=was_there)
    return None if state is None else _read(registry, endpoint, state)


def all_desired(registry: Registry) -> dict[str, Desired]:
    """What each endpoint shall serve, by its name."""
    found = ((name, desired_of(registry, name)) for name in registry.endpoint_names())
    return {name: desired for name, desired in found if desired is not None}


def change(registry: Registry, endpoint: str, edit: Callable[[Desired], Desired]) -> Desired | None:
    """Changes what an endpoint shall serve; returns it as it now is. An edit that changes nothing writes nothing."""

    def apply(state: dict[str, Any] | None) -> dict[str, Any] | None:
        if state is None:
            return None
        before = _read(registry, endpoint, state)
        after = edit(before)
        return state if after == before else after.to_dict()

    now = registry.update_endpoint(endpoint, apply)
    return None if now is None else _read(registry, endpoint, now)


def _read(registry: Registry, endpoint: str, state: dict[str, Any]) -> Desired:
    with stored.reading(registry.endpoint_url(endpoint)):
        return Desired.from_dict(state)


def take_step(registry: Registry, endpoint: str, rollout: Rollout, step: Step, *, by: str) -> bool:
    """Takes a rollout's step and writes it into the audit log; False where another has decided meanwhile.

    Args:
        by: who decides: a replica, or a user.
    """
    before = registry.alias(rollout.name, rollout.alias) if step.kind == "promote" else None
    taken: list[bool] = []

    def edit(now: Desired) -> Desired:
        after = now.after(rollout.id, step, time.time(), before)
        taken[:] = [after != now]
        return after

    change(registry, endpoint, edit)
    if not taken or not taken[0]:
        return False
    Reports(registry.url, endpoint).note(
        {"begin": "began", "promote": "promoting", "rollback": "rolling back"}[step.kind],
        adapter=rollout.ref,
        alias=rollout.alias,
        rollout=rollout.id,
        reasons=list(step.reasons),
        by=by,
    )
    return True


def finish(registry: Registry, endpoint: str, rollout: Rollout, *, by: str) -> None:
    """Carries out what was decided: sets the alias, or takes the version out of service. Where it broke off, the
    next one who calls it ends it; done twice, it does nothing more."""
    audit = Reports(registry.url, endpoint)
    facts = {"adapter": rollout.ref, "alias": rollout.alias, "rollout": rollout.id, "by": by}
    if rollout.state == "promoting":
        registry.set_alias(rollout.name, rollout.candidate, rollout.alias)
        audit.note("promoted", **facts, before=rollout.before, reasons=list(rollout.reasons))
    elif rollout.state == "withdrawing":
        registry.release(rollout.ref, endpoint)
        now = registry.alias(rollout.name, rollout.alias)
        audit.note("rolled back", **facts, stays=now, reasons=list(rollout.reasons))
    else:
        return
    change(registry, endpoint, lambda desired: desired.finished(rollout.id))


def promote(registry: Registry, ref: str, alias: str | None = None, *, by: str = "user") -> str:
    """Gives a served version the alias now, whether it is being rolled out or not; returns the endpoint.

    Args:
        alias: that of its rollout, else `production`.

    Raises:
        RegistryError: there is no such version.
        ServeError: no endpoint serves it.
    """
    name, number = registry.resolve(ref)
    ref = f"{name}@{number}"
    for endpoint, desired in all_desired(registry).items():
        rolling = [
            each for each in desired.rollouts if each.ref == ref and (alias is None or each.alias == alias)
        ]
        for rollout in rolling:
            _decide(registry, endpoint, rollout, Step("promote", ("asked for",)), by)
        if rolling:
            return endpoint
    for endpoint, desired in all_desired(registry).items():
        if desired.served(ref) is not None:
            _give(registry, endpoint, name, number, alias or DEFAULT_ALIAS, by)
            return endpoint
    raise ServeError(f"no endpoint serves {ref}.", hint=f"Serve it first: raypeft deploy {ref}")


def withdraw(registry: Registry, endpoint: str, rollout: Rollout, why: str, *, by: str = "deploy") -> None:
    """Takes back a version that is being rolled out."""
    _decide(registry, endpoint, rollout, Step("rollback", (why,)), by)


def rollback(
    registry: Registry, name: str, alias: str = DEFAULT_ALIAS, *, by: str = "user"
) -> tuple[str, int | None]:
    """Takes back what is being rolled out to an alias; else gives the alias to the version before.

    Returns:
        The endpoint, and the version that the alias names now; None where it names none.

    Raises:
        RegistryError: there is no such adapter.
        ServeError: nothing is rolled out, and no version before is known.
    """
    for endpoint, desired in all_desired(registry).items():
        if (rollout := desired.rollout(name, alias)) is not None:
            _decide(registry, endpoint, rollout, Step("rollback", ("asked for",)), by)
            return endpoint, registry.alias(name, alias)
    for endpoint, desired in all_desired(registry).items():
        if trail := desired.earlier.get(f"{name}@{alias}"):
            return endpoint, _step_back(registry, endpoint, name, alias, trail[-1], by)
    if not registry.versions(name):
        registry.get(name)  # says that there is no such adapter
    raise ServeError(
        f"nothing of '{name}' is being rolled out, and no version before {name}@{alias} is known.",
        hint=f"See: raypeft adapters {name}; point the alias by hand: raypeft alias {name}@VERSION {alias}",
    )


def _decide(registry: Registry, endpoint: str, rollout: Rollout, step: Step, by: str) -> None:
    take_step(registry, endpoint, rollout, step, by=by)
    desired = desired_of(registry, endpoint)
    for each in desired.rollouts if desired else ():
        if each.id == rollout.id:
            finish(registry, endpoint, each, by=by)


def _give(registry: Registry, endpoint: str, name: str, number: int, alias: str, by: str) -> None:
    before = registry.alias(name, alias)
    registry.set_alias(name, number, alias)
    change(registry, endpoint, lambda now: now.passed(name, alias, before, number))
    facts = {"adapter": f"{name}@{number}", "alias": alias, "before": before, "by": by}
    Reports(registry.url, endpoint).note("promoted", **facts, reasons=["asked for"])


def _step_back(registry: Registry, endpoint: str, name: str, alias: str, earlier: int, by: str) -> int:
    left = registry.alias(name, alias)
    ref = f"{name}@{earlier}"
    try:
        registry.hold(ref, endpoint)
    except RegistryError as error:
        raise ServeError(f"{ref}, the version before, is not there any more: {error}") from error
    change(
        registry,
        endpoint,
        lambda now: now if now.served(ref) else now.with_adapter(Served(name, earlier)),
    )
    registry.set_alias(name, earlier, alias)

    def leave(now: Desired) -> Desired:
        stepped = now.stepped_back(name, alias)
        return stepped if left in (None, earlier) else stepped.without(f"{name}@{left}")

    change(registry, endpoint, leave)
    if left not in (None, earlier):
        registry.release(f"{name}@{left}", endpoint)
    Reports(registry.url, endpoint).note(
        "rolled back", adapter=f"{name}@{left}", alias=alias, stays=earlier, reasons=["asked for"], by=by
    )
    return earlier
