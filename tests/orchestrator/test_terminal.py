import io
import json
import os

import pytest
from rich.console import Console

from orchestrator.terminal import JsonView, LiveView, PlainView, View, clock, describe, view_for

PROGRESS = {
    "event": "progress", "t": 0.0, "step": 3, "total_steps": 10, "epoch": 0, "loss": 2.5, "learning_rate": 1e-3,
    "grad_norm": 1.0, "tokens_per_s": 1204.4, "eta_s": 65.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (PROGRESS, "step 3/10  loss 2.5000  lr 1.0e-03  1,204 tokens/s  1:05 left"),
        ({"event": "eval", "step": 5, "metrics": {"eval_loss": 2.0}}, "step 5  eval_loss 2.0000"),
        (
            {"event": "eval", "trial": 3, "step": 5, "metrics": {"eval_loss": 2.0}},
            "trial 3  step 5  eval_loss 2.0000",
        ),
        ({"event": "checkpoint", "step": 5, "path": "x"}, "step 5  checkpoint saved"),
        ({"event": "warning", "message": "slow"}, "warning: slow"),
        ({"event": "state", "state": "done", "message": "done: a@1"}, "done: a@1"),
        (
            {"event": "failure", "attempt": 1, "rank": 1, "cause": "killed by signal 9", "will_retry": True},
            "worker 1 failed: killed by signal 9; going on from the last checkpoint",
        ),
        (
            {"event": "failure", "attempt": 3, "rank": None, "cause": "no room", "will_retry": False},
            "the run failed: no room; giving up",
        ),
    ],
)
def test_each_event_is_one_line(event, line):
    assert describe(event) == line


def test_clock():
    assert [clock(9), clock(75), clock(3675)] == ["0:09", "1:15", "1:01:15"]


def test_json_view_prints_each_event_as_it_is():
    out = io.StringIO()
    with JsonView(out) as view:
        view(PROGRESS)
        view({"event": "warning", "message": "m"})
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [
        PROGRESS,
        {"event": "warning", "message": "m"},
    ]


def test_plain_view_thins_progress_but_never_drops_the_last_step():
    out = io.StringIO()
    with PlainView(out) as view:
        for step in range(1, 11):
            view(PROGRESS | {"step": step})
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/10", "10/10"]


def test_live_view_shows_the_bar_and_keeps_what_happened():
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    with LiveView(console) as view:
        view({"event": "state", "state": "training", "message": "two workers"})
        view(PROGRESS)
        view.bar.refresh()
    shown = console.file.getvalue()
    assert "two workers" in shown and "3/10" in shown and "loss 2.5000" in shown


def test_a_narrow_terminal_still_shows_step_loss_and_time_left():
    console = Console(file=io.StringIO(), force_terminal=True, width=48)
    with LiveView(console) as view:
        view(PROGRESS)
        view.bar.refresh()
    shown = console.file.getvalue()
    assert "3/10" in shown and "loss 2.5000  1:05 left" in shown and "…" not in shown


def test_the_view_follows_flags_and_terminal():
    pipe, terminal = Console(file=io.StringIO()), Console(file=io.StringIO(), force_terminal=True)
    kinds = [
        type(view_for(as_json=as_json, quiet=quiet, console=console))
        for as_json, quiet, console in [
            (True, False, terminal),
            (False, True, terminal),
            (False, False, terminal),
            (False, False, pipe),
        ]
    ]
    assert kinds == [JsonView, View, LiveView, PlainView]


def test_the_failure_that_ends_a_command_is_left_to_its_error():
    last = {"event": "failure", "attempt": 3, "rank": 0, "cause": "no room", "will_retry": False}
    plain, console = io.StringIO(), Console(file=io.StringIO(), force_terminal=True, width=140)
    with PlainView(plain) as view, LiveView(console) as live:
        for event in (last, {**last, "will_retry": True}):
            view(event)
            live(event)
    for shown in (plain.getvalue(), console.file.getvalue()):
        assert shown.count("no room") == 1 and "going on from the last checkpoint" in shown


@pytest.mark.parametrize("view", [JsonView, PlainView])
def test_what_is_shown_to_a_reader_that_has_gone_ends_nothing(view):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        with view(out) as shown:
            shown({"event": "warning", "message": "first"})
            shown({"event": "warning", "message": "second"})
        print("said afterwards", file=out, flush=True)
