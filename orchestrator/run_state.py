"""The states of a run and the ways between them."""

from __future__ import annotations

ACTIVE = (
    "starting", "waiting", "training", "evaluating", "saving", "gating", "registering", "registered",
    "deploying",
)  # fmt: skip
"""States in which a driver is at work."""
ENDED = (
    "done", "registered, not deployed", "registered, refused by the gate", "registered, waiting to deploy",
    "failed", "interrupted",
)  # fmt: skip
"""States in which nobody is. From all but `done` the same command goes on."""
CREATED = "created"


def check_transition(before: str, after: str) -> None:
    """Raises ValueError where no run goes from `before` to `after`: a mistake of ours, not of a user."""
    if after not in (*ACTIVE, *ENDED):
        raise ValueError(f"'{after}' is not a state of a run")
    if before == "done" and after not in ("done", "starting"):
        raise ValueError(f"a run that is done does not become {after}")


def has_ended(state: str) -> bool:
    """Whether nobody is at work in `state`."""
    return state in ENDED
