"""What the service asks of whatever trains: start, follow, stop. `train.launch.RayRunner` is the real one;
tests use one in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .lease import Fence
from .plan import Plan
from .spec.job import JobSpec

Event = dict[str, Any]
"""`{"event": KIND, "t": unix seconds, ...}`. Kinds and their keys:

state       state: starting | waiting | training | evaluating | saving | registering | deploying | done | failed
            | interrupted; message
progress    step, total_steps, epoch, loss, learning_rate, grad_norm, tokens_per_s, eta_s
eval        step, metrics: {name: number}
checkpoint  step, path
warning     message
failure     attempt, rank (or null), kind (worker lost, node lost, ...), cause, will_retry
log         rank, text: what a worker printed, secrets taken out; kept in the run's logs, never shown as it comes

Of a sweep, whose progress, eval and warning events have `trial`, a number, where they are of one trial:

trial       trial, id, state: started | resumed | finished | stopped | failed; parameters, step, metrics, cause
pack        mode: together | turns; trials, reason: how a group of workers steps its trials from now on
report      html, png: paths or URLs of what was plotted
best        trial, parameters, metric, value
"""


@dataclass(frozen=True)
class Spent:
    """What a run's drivers used up of its `retry` until now."""

    seconds: float = 0.0
    """Under way, waiting for room included; of a driver that was killed, to its last renewal of the lease."""
    retries: Mapping[str, int] = field(default_factory=dict)
    """Kind of a failure (`worker lost`, ...) -> how often the run was started again after one."""


@dataclass(frozen=True)
class TrainRequest:
    """All that the workers need. `secrets` never reaches a log, an event or a stored file."""

    spec: JobSpec
    plan: Plan
    run_dir: str
    """URL of the run's folder; every node sees it."""
    run_id: str
    data_hash: str
    init_from: str | None = None
    """Directory or URL of the adapter to train on from."""
    starts: Mapping[str, str] = field(default_factory=dict)
    """Of a sweep: `adapter.init_from` as a trial's job says it -> directory or URL."""
    compare: Mapping[str, str] = field(default_factory=dict)
    """Adapters to evaluate beside this run's: `{"production": directory or URL}`; the bare base always is."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    fence: Fence | None = None
    """The right to commit to the run; None where nobody else can."""
    spent: Spent = field(default_factory=Spent)
    """By drivers before."""


@dataclass(frozen=True)
class TrainOutcome:
    """What a finished training leaves behind."""

    adapter_dir: str
    """URL of a complete adapter directory (HF PEFT's layout) inside the run's folder."""
    metrics: dict[str, float]
    """`eval_loss`, `base.eval_loss`, `production.eval_loss`, `exact_match`, `train_loss`, ..."""
    steps: int
    first_step_s: float
    """Seconds from `Runner.start` to the end of the first optimizer step."""
    train_rows: str
    """URL of the file of content hashes of the rows that were trained on, one hexadecimal hash a line."""
    eval_rows: str
    """Likewise for the rows of the evaluation."""
    question: str | None = None
    """The question of the first evaluation row, to ask the endpoint; None for plain text."""
    spec: JobSpec | None = None
    """The job that trained it, where that is not the request's: a sweep's best trial's."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Of a trial: `sweep` (the run's id), `trial`, `parameters`, `trials` (how many there were)."""


class Runner(Protocol):
    """One training at a time."""

    def start(self, request: TrainRequest) -> None:
        """Returns at once; raises a RaypeftError where the request can never be placed."""

    def events(self) -> Iterator[Event]:
        """Yields events as they come and ends when the run has ended."""

    def stop(self) -> None:
        """Asks the workers to checkpoint and leave; `events` then ends within 30 s."""

    def outcome(self) -> TrainOutcome:
        """After `events` has ended: the result, or raises the RaypeftError that ended the run."""
