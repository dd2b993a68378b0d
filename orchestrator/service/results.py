"""What use cases come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..stored import known


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
