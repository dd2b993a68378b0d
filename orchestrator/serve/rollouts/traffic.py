"""What endpoints do right now, as people and scripts read it: rollouts under way, and what each adapter answers. All
of it from the registry's storage: no cluster is needed, none is asked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.registry import Registry

from ..desired import Desired
from ..naming import base_id
from ..rollout import Rollout, breaches
from .numbers import Numbers
from .promotion import all_desired
from .reports import Report, Reports, observe


@dataclass(frozen=True)
class RolloutRow:
    """One rollout as `raypeft rollout status` shows it."""

    endpoint: str
    name: str
    alias: str
    candidate: str
    """`name@version`."""
    stable: str | None
    """What the alias names now."""
    state: str
    """starting | baking | promoting | withdrawing"""
    canary_percent: float
    sticky_key: str
    shadow_percent: float
    bake_s: float
    baked_s: float
    """Seconds of it that are over."""
    rollback: dict[str, list[str]] | None
    metrics: dict[str, float] = field(default_factory=dict)
    breaches: tuple[str, ...] = ()
    """Conditions by which it is about to be taken back."""
    replicas: int = 0
    """Those that answer for the candidate."""

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class TrafficRow:
    """One version on one endpoint as `raypeft top` shows it."""

    endpoint: str
    model: str
    """`name@version`, or the base's name."""
    aliases: tuple[str, ...]
    state: str
    """loaded | cold | loading | refused | absent, in the replica that has it best; `canary` while it is watched."""
    replicas: int
    """Those that have it loaded."""
    requests: int
    errors: int
    tokens: int
    requests_per_s: float | None
    """Over the last interval; None at the first look."""
    tokens_per_s: float | None
    latency_p50: float | None
    latency_p99: float | None
    first_token_p50: float | None

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def rollout_rows(registry: Registry, name: str | None = None) -> list[RolloutRow]:
    """What is being rolled out, of one adapter or of all."""
    rows = []
    for endpoint, desired in all_desired(registry).items():
        if wanted := [each for each in desired.rollouts if name in (None, each.name)]:
            reports = Reports(registry.url, endpoint).read()
            rows += [_rollout_row(registry, endpoint, each, reports) for each in wanted]
    return rows


def audit_lines(registry: Registry, name: str | None = None) -> list[dict[str, Any]]:
    """The steps of all rollouts, of one adapter or of all, oldest first."""
    found = []
    for endpoint in registry.endpoint_names():
        for line in Reports(registry.url, endpoint).audit():
            if name is None or str(line.get("adapter", "")).partition("@")[0] == name:
                found.append({"endpoint": endpoint, **line})
    return sorted(found, key=lambda line: line["at"])


@dataclass(frozen=True)
class Counted:
    """Requests and tokens so far, by (endpoint, model), and when."""

    at: float
    totals: dict[tuple[str, str], tuple[int, int]]


def traffic_rows(registry: Registry, before: Counted | None = None) -> tuple[list[TrafficRow], Counted]:
    """What each version answers, busiest first; with what to give to the next look, for rates.

    Replicas that are gone count no more, so a number may fall; a rate never does below 0.
    """
    now, rows = time.time(), []
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for endpoint, desired in all_desired(registry).items():
        reports = [each for each in Reports(registry.url, endpoint).read() if each.is_live(now)]
        aliases = {name: registry.aliases(name) or {} for name in {entry.name for entry in desired.adapters}}
        for model in [base_id(desired.base), *(entry.ref for entry in desired.adapters)]:
            numbers = _sum(each.totals[model] for each in reports if model in each.totals)
            key = (endpoint, model)
            totals[key] = (numbers.requests, numbers.tokens)
            rates = _rates(before, now, key, totals[key])
            rows.append(_traffic_row(endpoint, model, desired, reports, aliases, numbers, rates))
    rows.sort(key=lambda row: (row.endpoint, -(row.requests_per_s or 0.0), -row.requests, row.model))
    return rows, Counted(now, totals)


def _rollout_row(
    registry: Registry, endpoint: str, rollout: Rollout, reports: Iterable[Report]
) -> RolloutRow:
    now, reports = time.time(), list(reports)
    seen = observe(rollout, reports, now)
    stable = registry.alias(rollout.name, rollout.alias)
    return RolloutRow(
        endpoint=endpoint,
        name=rollout.name,
        alias=rollout.alias,
        candidate=rollout.ref,
        stable=None if stable is None else f"{rollout.name}@{stable}",
        state=rollout.state,
        canary_percent=rollout.canary_percent,
        sticky_key=rollout.sticky_key,
        shadow_percent=rollout.shadow_percent,
        bake_s=rollout.bake_s,
        baked_s=0.0 if rollout.began is None else max(0.0, round(now - rollout.began, 1)),
        rollback=rollout.rollback,
        metrics=dict(seen.metrics),
        breaches=breaches(rollout, seen.metrics),
        replicas=sum(each.is_live(now) and each.states.get(rollout.ref) == "loaded" for each in reports),
    )


def _traffic_row(
    endpoint: str,
    model: str,
    desired: Desired,
    reports: list[Report],
    aliases: Mapping[str, Mapping[str, int]],
    numbers: Numbers,
    rates: tuple[float | None, float | None],
) -> TrafficRow:
    metrics = numbers.metrics()
    name, _, version = model.partition("@")
    is_base = not version
    states = ["loaded"] * len(reports) if is_base else [each.states.get(model, "absent") for each in reports]
    best = next((state for state in _BEST_FIRST if state in states), "absent")
    rolling = any(each.ref == model and each.state == "baking" for each in desired.rollouts)
    named = sorted(alias for alias, number in aliases.get(name, {}).items() if str(number) == version)
    return TrafficRow(
        endpoint=endpoint,
        model=model,
        aliases=tuple(named),
        state="canary" if rolling else best,
        replicas=states.count("loaded"),
        requests=numbers.requests,
        errors=numbers.errors,
        tokens=numbers.tokens,
        requests_per_s=rates[0],
        tokens_per_s=rates[1],
        latency_p50=metrics.get("latency_p50"),
        latency_p99=metrics.get("latency_p99"),
        first_token_p50=metrics.get("first_token_p50"),
    )


_BEST_FIRST = ("loaded", "loading", "cold", "refused")


def _sum(numbers: Iterable[Numbers]) -> Numbers:
    total = Numbers()
    for each in numbers:
        total = total.plus(each)
    return total


def _rates(
    before: Counted | None, now: float, key: tuple[str, str], totals: tuple[int, int]
) -> tuple[float | None, float | None]:
    if before is None or now <= before.at:
        return None, None
    earlier = before.totals.get(key, (0, 0))
    passed = now - before.at
    requests, tokens = (max(0, new - old) / passed for new, old in zip(totals, earlier, strict=True))
    return requests, tokens
