"""What run.json says of a run."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import stored
from ..lease import Holder, holder_of
from ..objects import join
from ..run_state import ENDED, has_ended
from ..runner import Spent


@dataclass(frozen=True)
class RunRecord:
    """What run.json says. Times are unix seconds."""

    id: str
    name: str
    """The job's name."""
    number: int
    """1, and more for those that `--new` made."""
    url: str
    state: str
    """A state of `run_state`, or `unreadable`. One whose driver died is `interrupted`."""
    identity: str = ""
    """sha256 over spec and data."""
    spec_hash: str = ""
    data_hash: str = ""
    training_id: str = ""
    """Another one after a resume that trains on: what a version's lineage names as its run."""
    created: float = 0.0
    updated: float = 0.0
    adapter: str | None = None
    """`NAME@V` once it is registered."""
    metrics: dict[str, float] = field(default_factory=dict)
    endpoint: dict[str, Any] | None = None
    cause: str | None = None
    """Why it failed or was interrupted."""
    message: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever else was given to `set_state`."""
    holder: Holder | None = None
    spent: Spent = field(default_factory=Spent)
    spec_yaml: str = field(default="", repr=False)
    """The resolved job."""

    @property
    def has_ended(self) -> bool:
        """Whether nobody is at work on it."""
        return self.state == "unreadable" or has_ended(self.state)

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        facts = asdict(self)
        facts["holder"] = str(self.holder) if self.holder else None
        del facts["spec_yaml"], facts["facts"]
        return stored.finite({**self.facts, **facts})


def read_record(document: dict[str, Any], url: str) -> RunRecord:
    """Reads what another version may have written: unknown keys are passed over."""
    holder = holder_of(document)
    state, cause = document["state"], document.get("cause")
    if state not in ENDED and (holder is None or holder.seems_gone()):
        cause = f"its driver died: {holder}." if holder else "its driver left."
        state = "interrupted"
    return RunRecord(
        id=document["id"], name=document["name"], number=document["number"], url=url, state=state,
        identity=document["identity"], spec_hash=document["spec_hash"], data_hash=document["data_hash"],
        training_id=document["training_id"], created=document["created"], updated=document["updated"],
        adapter=document.get("adapter"), metrics=stored.numbers(document.get("metrics") or {}),
        endpoint=document.get("endpoint"), cause=cause, message=document.get("message"),
        facts=document.get("facts", {}), holder=holder, spec_yaml=document["spec"],
        spent=spent_of(document),
    )  # fmt: skip


def spent_of(document: dict[str, Any]) -> Spent:
    """What the run has used of `max_duration` and `retry`."""
    kept = document.get("spent") or {}
    return Spent(kept.get("seconds", 0.0), dict(kept.get("retries") or {}))


def forget_spent(document: dict[str, Any]) -> None:
    """What a run has used counts no more."""
    document["spent"] = {}


def run_identity(spec_hash: str, data_hash: str) -> str:
    """What makes two runs the same: sha256, hexadecimal, over the hashes of their spec and data."""
    return hashlib.sha256(f"{spec_hash} {data_hash}".encode()).hexdigest()


def log_url(run_url: str, rank: int) -> str:
    """Where the log of a run's worker is."""
    return join(run_url, "logs", f"worker-{rank}.log")
