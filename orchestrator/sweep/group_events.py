"""What groups of workers say of themselves: told on, and failures counted against the sweep's retries."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.errors import TrainingError
from orchestrator.runner import Event, TrainRequest
from orchestrator.train.retries import FailureKind, Retries


class GroupEvents:
    """Of the groups of one sweep.

    Args:
        request: the sweep's own.
        tell: an event of the sweep.
    """

    def __init__(self, request: TrainRequest, tell: Callable[..., None]) -> None:
        self._where, self._tell = f"sweep {request.run_id}", tell
        self._retries = Retries(request.spec.retry, request.spent.retries)

    def take(self, event: Event) -> None:
        """An event that is of no trial.

        Raises:
            TrainingError: a group failed for which there is no other try.
        """
        kind = event["event"]
        if kind == "group_failed":
            self._failed(event)
        elif kind == "ready":
            message = event.get("message") or f"a group of workers is ready after {event['seconds']:.0f} s"
            self._tell("state", state="training", message=message)
        elif kind in ("pack", "log", "warning"):
            self._tell(kind, **{name: value for name, value in event.items() if name not in ("event", "t")})

    def _failed(self, event: Event) -> None:
        kind, cause = event["kind"], event["cause"]
        less = _with_less(event)
        try:
            will_retry = less is not None or self._retries.allow(FailureKind(kind))
        except ValueError:
            will_retry = False
        self._tell(
            "failure", attempt=1, rank=event.get("rank"), kind=kind, cause=cause, will_retry=will_retry
        )
        if less is not None:
            self._tell("warning", message=less)
        if not will_retry:
            raise TrainingError(
                f"a group of workers failed: {cause}",
                where=self._where,
                hint="Run the same command again: it goes on from the trials' checkpoints.",
            )


def _with_less(event: Event) -> str | None:
    """How trials go on after a group whose memory ran out (`Groups.take`); None where nothing was to be done."""
    if "at_once" in event:
        return (
            f"the trials on a base did not fit into memory together: {event['at_once']} at once from now on"
        )
    if "rows" in event:
        return f"trial {event['trial_alone']} did not fit into memory: going on with {event['rows']} rows a forward"
    if "fails" in event:
        return (
            f"trial {event['fails']} does not fit into memory by itself, and fails. retry.oom: 3 would let it try with "
            "fewer rows a forward."
        )
    return None
