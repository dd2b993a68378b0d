"""What is kept of a run's events."""

from __future__ import annotations

import time

from ..errors import StorageError
from ..runner import Event
from ..store import Run
from ..tracking.story import Story
from .environment import OnEvent


def recorder(run: Run, on_event: OnEvent, story: Story) -> OnEvent:
    """Keeps each event in the run's folder, then shows it and tells the trackers. What the storage does not take now
    waits for the next event: no training ends for a line of its story."""
    has_failed = False

    def emit(event: Event) -> None:
        story.take(event)
        keep(event)
        for warning in story.tracking.warnings():
            keep({"event": "warning", "message": warning})

    def keep(event: Event) -> None:
        nonlocal has_failed
        event = {"t": round(time.time(), 3), **event}
        try:
            _keep(run, event)
        except StorageError as error:
            if not has_failed:
                message = f"events cannot be stored now, and wait: {error}"
                on_event({"event": "warning", "t": event["t"], "message": message})
            has_failed = True
        else:
            has_failed = False
        if event["event"] != "log":  # of interest to `raypeft logs` alone
            on_event(event)

    return emit


def _keep(run: Run, event: Event) -> None:
    if event["event"] == "log":
        run.append_log(event["rank"], event["text"])
        return
    if event["event"] == "progress" and "trial" in event:
        return  # the trial's own run keeps it
    if event["event"] in ("progress", "eval"):
        run.append_metrics(event)
    if event["event"] != "progress":
        run.append_event(event)
