"""How one version takes the place of another: a pure machine over what is desired, what was observed and the time.

starting -> baking -> promoting -> (the alias names it)
    |          |
    +----------+----> withdrawing -> (it is served no more; the alias never moved)

Nothing here reads a clock or a storage: `arbiter.py` does, and applies the steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..gate import check
from ..spec.durations import format_duration
from ..spec.job import GateSpec, RolloutSpec
from ..stored import known

State = Literal["starting", "baking", "promoting", "withdrawing"]
StepKind = Literal["begin", "promote", "rollback"]


@dataclass(frozen=True)
class Rollout:
    """One version on its way to an alias."""

    id: str
    """What its numbers are counted under: no two rollouts share one, be they of the same version."""
    name: str
    alias: str
    candidate: int
    canary_percent: float = 100.0
    sticky_key: str = "user"
    shadow_percent: float = 0.0
    bake_s: float = 0.0
    """0: until somebody says so."""
    rollback: dict[str, list[str]] | None = None
    """A gate's form over live metrics: `{"any": ["error_rate > 0.05"]}`."""
    state: State = "starting"
    created: float = 0.0
    """Unix seconds."""
    began: float | None = None
    """When a replica first answered for the candidate, unix seconds."""
    reasons: tuple[str, ...] = ()
    """Why it is promoted or withdrawn."""
    before: int | None = None
    """What the alias named when it was decided that the candidate takes it."""

    @classmethod
    def of(cls, spec: RolloutSpec, name: str, version: int, alias: str, *, id: str, now: float) -> Rollout:
        """What a job's `deploy.rollout` asks for."""
        rollback = spec.rollback.model_dump(mode="json", exclude_none=True) if spec.rollback else None
        return cls(
            id=id,
            name=name,
            alias=alias,
            candidate=version,
            canary_percent=spec.canary_percent,
            sticky_key=spec.sticky_key,
            shadow_percent=spec.shadow_percent,
            bake_s=spec.bake,
            rollback=rollback,
            created=now,
        )

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Rollout:
        """Reads what `to_dict` wrote; unknown keys are passed over."""
        kept = known(cls, stored)
        return cls(**{**kept, "reasons": tuple(kept.get("reasons", ()))})

    @property
    def ref(self) -> str:
        """`name@version` of the candidate."""
        return f"{self.name}@{self.candidate}"

    @property
    def takes(self) -> str:
        """`name@alias`."""
        return f"{self.name}@{self.alias}"

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return {**asdict(self), "reasons": list(self.reasons)}

    def answers(self, sticky: str) -> bool:
        """Whether the candidate answers the requests of one sticky value that ask for the alias."""
        if self.state == "promoting":
            return True
        return self.state == "baking" and falls_below(self.canary_percent, f"{self.ref}:{sticky}")

    def shadows(self, sticky: str) -> bool:
        """Whether the candidate answers these too, for comparison alone."""
        return self.state == "baking" and falls_below(self.shadow_percent, f"shadow:{self.ref}:{sticky}")

    def describe(self) -> str:
        """In words, for terminals and logs."""
        parts = [f"{self.canary_percent:g} % of {self.takes} by '{self.sticky_key}'"]
        if self.shadow_percent:
            parts.append(f"{self.shadow_percent:g} % in shadow")
        parts.append(f"for {format_duration(self.bake_s)}" if self.bake_s else "until raypeft promote")
        return ", ".join(parts)


def falls_below(percent: float, value: str) -> bool:
    """Whether a value belongs to a share of all values: by its sha256 as a fraction of 2^64, on any machine alike. A
    larger share holds every value of a smaller one."""
    place = int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big")
    return place * 100 < percent * 2**64


@dataclass(frozen=True)
class Observed:
    """What the replicas say of one rollout, all together."""

    is_live: bool = False
    """A replica answers for the candidate."""
    refused: str | None = None
    """Why a replica cannot serve it."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """By the names of `spec.live_metrics`; what was not measured is not there."""


@dataclass(frozen=True)
class Step:
    """What is to happen now, and why."""

    kind: StepKind
    reasons: tuple[str, ...]


def decide(rollout: Rollout, observed: Observed, now: float) -> Step | None:
    """The next step; None: wait.

    Args:
        now: unix seconds.
    """
    if rollout.state not in ("starting", "baking"):
        return None
    if observed.refused is not None:
        return Step("rollback", (f"{rollout.ref} does not load: {observed.refused}",))
    if rollout.state == "starting":
        return Step("begin", (rollout.describe(),)) if observed.is_live else None
    if why := breaches(rollout, observed.metrics):
        return Step("rollback", why)
    since = now - (now if rollout.began is None else rollout.began)
    if rollout.bake_s and since >= rollout.bake_s:
        return Step("promote", (f"{format_duration(rollout.bake_s)} passed, {_seen(observed.metrics)}",))
    return None


def breaches(rollout: Rollout, metrics: Mapping[str, float]) -> tuple[str, ...]:
    """The reasons for which it is to be taken back; none: it is not. What was not measured breaks nothing."""
    if rollout.rollback is None:
        return ()
    verdict = check(GateSpec.model_validate(rollout.rollback), metrics, has_production=True)
    return tuple(reason for reason in verdict.reasons if ": holds" in reason) if verdict.passed else ()


def _seen(metrics: Mapping[str, float]) -> str:
    requests = int(metrics.get("requests", 0))
    said = f"{requests} requests"
    if "error_rate" in metrics:
        said += f", error rate {metrics['error_rate']:.3g}"
    if "shadow.agreement" in metrics:
        said += f", shadow agreement {metrics['shadow.agreement']:.3g}"
    return said
