"""Where an adapter version comes from: its base, spec, data, rows, metrics and parent."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from .identity import BaseIdentity
from .stored import known, numbers


@dataclass(frozen=True)
class Lineage:
    """What is known of a version's origin. An adapter trained elsewhere has a base and an `origin`."""

    base: BaseIdentity
    origin: str = "trained"
    """`trained` by a run here, or `registered from DIR_OR_HUB_ID`."""
    run_id: str | None = None
    spec_hash: str | None = None
    resolved_spec: str | None = None
    """The job as YAML, every default filled in."""
    data_hash: str | None = None
    quantization: str | None = None
    """How the base was kept while the adapter trained: `int8`, `nf4+double`; None: in its own precision. An endpoint
    keeps it as `deploy.engine.quantization` says, whatever stands here."""
    metrics: dict[str, float] = field(default_factory=dict)
    parent: str | None = None
    """The adapter that it was trained on from: `NAME@V`, a directory or a hub id."""
    sweep: dict[str, Any] = field(default_factory=dict)
    """Of a sweep's best trial: `sweep` (the run's id), `trial`, `parameters`, `trials` (how many there were)."""
    gate_passed: bool | None = None
    """None where no gate was asked."""
    gate_reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As stored."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Lineage:
        """Reads what `to_dict` wrote, also by another version: unknown keys are passed over."""
        kept = known(cls, stored)
        kept["base"] = BaseIdentity(**known(BaseIdentity, kept["base"]))
        kept["metrics"] = numbers(kept.get("metrics", {}))
        kept["gate_reasons"] = tuple(kept.get("gate_reasons", ()))
        return cls(**kept)


def row_hashes(content: bytes) -> list[str]:
    """The hashes in a file of rows: one hexadecimal hash a line."""
    return content.decode("ascii").split()


def rows_file(hashes: Iterable[str]) -> bytes:
    """The file that `row_hashes` reads."""
    return "".join(f"{row}\n" for row in hashes).encode("ascii")


def count_trained_on(eval_rows: Iterable[str], trained_rows: Collection[str]) -> int:
    """How many of the evaluation rows, given by hash, an adapter was trained on; repeated rows count."""
    trained = frozenset(trained_rows)
    return sum(row in trained for row in eval_rows)
