"""How a run's events look: a live bar on a terminal, plain lines without one, one JSON object an event with
`--json`, nothing with `--quiet`. A view is a context manager that is called with each event."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from contextlib import AbstractContextManager
from typing import IO, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column

from .runner import Event

PLAIN_INTERVAL_S = 5.0
"""Seconds between two progress lines where there is no terminal to redraw."""

WIDE = 80
"""Columns from which the bar leaves room for all facts of a step."""

_UNREAD = (errno.EPIPE, errno.EIO)
"""A pipe whose reader has ended; a terminal that was closed."""


class View(AbstractContextManager["View"]):
    """Shows nothing: `--quiet`, and the base of the others. Who reads may go away: what is shown goes on unseen."""

    out: IO[str]

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        try:
            self.show(event)
        except OSError as error:
            if error.errno in _UNREAD:
                discard(self.out)

    def show(self, event: Event) -> None:
        """Writes what an event comes to."""

    def __exit__(self, *exc: object) -> None:
        return None


class JsonView(View):
    """One JSON object a line, on standard output."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout

    def show(self, event: Event) -> None:
        print(json.dumps(event), file=self.out, flush=True)


class PlainView(View):
    """Lines for logs and pipes; progress at most every `PLAIN_INTERVAL_S` seconds and at the last step."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stderr
        self.last = 0.0

    def show(self, event: Event) -> None:
        if is_of_trial(event):
            return
        if event["event"] in ("progress", "merging"):
            done, total = (
                ("step", "total_steps") if event["event"] == "progress" else ("bytes", "total_bytes")
            )
            is_last = event[done] == event[total]
            if not is_last and time.monotonic() - self.last < PLAIN_INTERVAL_S:
                return
            self.last = time.monotonic()
        if not is_last_word(event) and (line := describe(event)):
            print(line, file=self.out, flush=True)


class LiveView(View):
    """A bar with step, loss, learning rate, tokens a second and the time left, above it what happened."""

    def __init__(self, console: Console) -> None:
        self.console, self.out = console, console.file
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),  # else it is cut before the bar is
            TextColumn("{task.fields[facts]}"),
            console=console,
            transient=True,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> LiveView:
        self.bar.start()
        self.task = self.bar.add_task("starting", total=None, facts="")
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def show(self, event: Event) -> None:
        assert self.task is not None
        kind = event["event"]
        if is_of_trial(event):
            return
        if kind == "trial":
            self.bar.update(
                self.task, description="trials", completed=event["ended"], total=event["trials"], facts=""
            )
        if kind == "progress":
            self.bar.update(
                self.task,
                description="training",
                completed=event["step"],
                total=event["total_steps"],
                facts=progress_facts(event) if self.console.width >= WIDE else short_facts(event),
            )
        elif kind == "merging":
            self.bar.update(
                self.task,
                description="merging",
                completed=event["bytes"] >> 20,
                total=event["total_bytes"] >> 20,
                facts=f"MiB  {event['num_workers']} {'worker' if event['num_workers'] == 1 else 'workers'}",
            )
        else:
            if kind == "state" and event["state"] != "training":
                self.bar.update(self.task, description=event["state"])
            if not is_last_word(event) and (line := describe(event)):
                style = {"failure": "red", "warning": "yellow"}.get(kind)
                self.console.print(line, style=style, highlight=False, markup=False)


def discard(out: IO[str]) -> None:
    """Sends whatever else is written there nowhere, what is still in its buffer too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, out.fileno())
    os.close(nowhere)


def view_for(*, as_json: bool, quiet: bool, console: Console) -> View:
    """The view that fits the flags and the terminal."""
    if as_json:
        return JsonView()
    if quiet:
        return View()
    return LiveView(console) if console.is_terminal else PlainView()


def progress_facts(event: Event) -> str:
    """`loss 2.31  lr 9.1e-04  1,204 tokens/s  0:12 left`."""
    return (
        f"loss {event['loss']:.4f}  lr {event['learning_rate']:.1e}  "
        f"{event['tokens_per_s']:,.0f} tokens/s  {clock(event['eta_s'])} left"
    )


def short_facts(event: Event) -> str:
    """`loss 2.31  0:12 left`."""
    return f"loss {event['loss']:.4f}  {clock(event['eta_s'])} left"


def is_last_word(event: Event) -> bool:
    """Whether an event is the failure that ends the command, which says it as its error."""
    return event["event"] == "failure" and not event["will_retry"]


def is_of_trial(event: Event) -> bool:
    """Whether an event is a step or an evaluation of one of many trials, too many to show."""
    return "trial" in event and event["event"] in ("progress", "eval")


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(event: Event) -> str:
    """One line for one event; empty where there is nothing to say."""
    match event["event"]:
        case "progress":
            return f"step {event['step']}/{event['total_steps']}  {progress_facts(event)}"
        case "merging":
            share = 100 * event["bytes"] / max(event["total_bytes"], 1)
            return f"merged {event['bytes'] / 1e9:.2f} of {event['total_bytes'] / 1e9:.2f} GB ({share:.0f} %)"
        case "eval":
            whose = f"trial {event['trial']}  " if "trial" in event else ""
            return f"{whose}step {event['step']}  " + describe_metrics(event["metrics"])
        case "checkpoint":
            return f"step {event['step']}  checkpoint saved"
        case "state":
            return event.get("message", "")
        case "trial":
            return _describe_trial(event)
        case "report":
            return f"plots and table: {event['html']}"
        case "best":
            return (
                f"the best is trial {event['trial']}: {event['metric']} {event['value']:.4f}  "
                + _parameters(event["parameters"])
            )
        case "warning":
            return f"warning: {event['message']}"
        case "failure":
            way_on = "going on from the last checkpoint" if event["will_retry"] else "giving up"
            who = f"worker {event['rank']}" if event.get("rank") is not None else "the run"
            return f"{who} failed: {event['cause']}; {way_on}"
    return ""


def _describe_trial(event: Event) -> str:
    """`[3/24] trial 7 stopped at step 40 (the scheduler)`."""
    said = f"[{event['ended']}/{event['trials']}] trial {event['trial']} {event['state']}"
    if event["state"] in ("started", "resumed"):
        return f"{said}  {_parameters(event['parameters'])}"
    said += f" at step {event['step']}"
    if metrics := event.get("metrics"):
        return f"{said}  {describe_metrics(metrics)}"
    return f"{said} ({event['cause']})" if event.get("cause") else said


def _parameters(parameters: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} ({_parameters(value)})"
        if isinstance(value, dict)
        else f"{key} {value:.3g}"
        if isinstance(value, float)
        else f"{key} {value}"
        for key, value in parameters.items()
    )


def describe_metrics(metrics: dict[str, float]) -> str:
    """`eval_loss 2.1034  exact_match 0.25`."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
