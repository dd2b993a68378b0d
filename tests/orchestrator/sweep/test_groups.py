"""Which trial stands on which base."""

import time
from dataclasses import replace

import pytest

from orchestrator.errors import SpecError
from orchestrator.plan.layout import Layout, lay_out, packed_memory
from orchestrator.plan.memory import Memory
from orchestrator.plan.row_lengths import RowFacts
from orchestrator.plan.sweep import make_sweep_plan
from orchestrator.spec.load import load_job_text
from orchestrator.sweep.groups import Groups

from .trainers import FakeGroup, request_of

JOB = """
model: {base_model: b}
data: {datasets: [{path: a.jsonl}]}
training: {max_steps: 1000, eval_steps: 10}
"""


def sweep_of(more=""):
    text = f"{JOB}sweep: {{{more}space: {{training.learning_rate: {{uniform: [0.1, 1]}}}}}}"
    return load_job_text(text, "jobs/x.yaml").spec.sweep


@pytest.fixture
def standing(tmp_path):
    """Groups of fakes: at most two, two trials on each base; and what was opened."""
    opened = []

    def open_group(request, layout):
        opened.append(FakeGroup([], request, layout.pack))
        return opened[-1]

    groups = Groups(open_group, lambda request: request.run_id, Layout(2, 2, 4), lambda starting: True)
    yield groups, opened, request_of(JOB, tmp_path)
    groups.close(1.0)


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_a_pack_is_filled_before_another_base_is_loaded(standing, tmp_path):
    groups, opened, request = standing
    (tmp_path / "sweep-1").mkdir()
    for name in "0123":
        groups.enter(name, request)
    assert [sorted(each.name for each in group.line) for group in opened] == [["0", "1"], ["2", "3"]]
    groups.enter("4", request)  # in line, on the base with fewest
    assert len(opened) == 2 and sorted(groups.trials) == list("01234")


def test_trials_of_a_group_that_died_go_on_elsewhere(standing, tmp_path):
    groups, opened, request = standing
    (tmp_path / "sweep-1").mkdir()
    for name in "01":
        groups.enter(name, request)
    opened[0].die()
    events = []
    assert until(lambda: events.extend(groups.take()) or any(e["event"] == "group_failed" for e in events))
    assert until(lambda: groups.take() is not None and len(opened) == 2 and len(opened[1].line) == 2)
    assert set(groups.trials) == {"0", "1"}


def test_a_trial_that_leaves_a_base_still_loading_is_not_waited_for(standing, tmp_path):
    groups, opened, request = standing
    (tmp_path / "sweep-1").mkdir()
    groups.open(request)
    opened[0].leave = lambda trial, save=True: None  # no worker is there to answer
    groups.enter("0", request)
    groups.leave("0")
    assert [event["trial"] for event in groups.take() if event["event"] == "left"] == ["0"]
    assert groups.trials == ()


def test_a_trial_that_was_to_leave_a_group_that_died_has_left(standing, tmp_path):
    groups, opened, request = standing
    (tmp_path / "sweep-1").mkdir()
    for name in "01":
        groups.enter(name, request)
    assert until(lambda: any(event["event"] == "ready" for event in groups.take()))
    opened[0].leave = lambda trial, save=True: None
    groups.leave("0")
    opened[0].die()
    events = []
    assert until(lambda: events.extend(groups.take()) or any(e["event"] == "group_failed" for e in events))
    assert [event["trial"] for event in events if event["event"] == "left"] == ["0"]
    assert groups.trials == ("1",)


def test_a_base_of_its_own_is_let_go_to_make_room(standing, tmp_path):
    groups, opened, request = standing
    (tmp_path / "sweep-1").mkdir()
    for name in "01":
        groups.enter(name, replace(request, run_id=name))
    groups.leave("0")
    groups.enter("2", replace(request, run_id="2"))
    assert len(opened) == 3 and not opened[0].is_alive and opened[1].is_alive


@pytest.mark.parametrize(
    ("more", "room", "layout"),
    [
        ("", 1, Layout(1, 8, 8)),
        ("", 2, Layout(2, 5, 10)),
        ("max_concurrent: 3, ", 4, Layout(1, 3, 3)),
        ("max_concurrent: 8, ", 2, Layout(2, 4, 8)),
        ("pack: 1, ", 2, Layout(2, 1, 2)),
        ("pack: 4, max_concurrent: 6, ", 3, Layout(2, 4, 6)),
        ("num_trials: 2, ", 8, Layout(1, 2, 2)),
    ],
)
def test_how_trials_are_laid_out(more, room, layout):
    sweep = sweep_of(more)
    assert lay_out(sweep, sweep.num_trials or 10, room) == layout


@pytest.mark.parametrize(
    ("training", "often"),
    [
        ("eval_steps: 5000", "is evaluated once, at its end"),
        ("max_steps: 12", "12 steps is evaluated once, at its end"),
        ("evals_per_epoch: 4, max_steps: 3", "3 steps is evaluated once, at its end"),
        ("evals_per_epoch: 20, max_steps: 12", None),
        ("num_epochs: 2", None),
    ],
)
def test_a_scheduler_that_never_sees_a_trial_before_its_end_is_refused(training, often):
    job = JOB.replace("max_steps: 1000, eval_steps: 10", training)
    spec = load_job_text(
        f"{job}sweep: {{scheduler: asha, space: {{adapter.r: {{choice: [4]}}}}}}", "jobs/x.yaml"
    ).spec
    rows = RowFacts(count=100)
    if often is None:
        make_sweep_plan(spec, None, None, rows)
        return
    make_sweep_plan(spec, None, None)  # nobody knows
    with pytest.raises(SpecError, match=often):
        make_sweep_plan(spec, None, None, rows)


TRIAL = Memory(base=1000, adapter=10, gradients=5, optimizer=20, activations=95, framework=0)


@pytest.mark.parametrize(
    ("more", "worker", "layout"),
    [
        (
            "",
            1100 + 3 * 30,
            Layout(1, 3, 3, joined=1),
        ),  # three adapters with their states, one of them at a time
        ("", 1000 + 8 * 30 + 3 * 100, Layout(1, 8, 8, joined=3)),
        ("", 1000 + 8 * 30 + 20 * 100, Layout(1, 8, 8, joined=8)),
        ("pack: 2, ", 1000 + 2 * 30 + 199, Layout(1, 2, 2, joined=1)),
    ],
)
def test_a_pack_takes_no_more_memory_than_a_worker_has(more, worker, layout):
    found = lay_out(sweep_of(more), 10, 1, TRIAL, worker)
    assert found == layout and packed_memory(TRIAL, found).total <= worker


def lost_to_memory(groups, group):
    """The events that tell of it, once another group has what is left."""
    events = []
    with group.lock:
        lost, group.line = [each.name for each in group.line], []
    group.tell("group_failed", kind="out of memory", cause="worker 0 ran out of memory", rank=0, trials=lost)
    group.is_alive = False
    assert until(lambda: events.extend(groups.take()) or any(e["event"] == "group_failed" for e in events))
    return events


def entered(group, groups, *trials):
    for trial in trials:
        group.tell("entered", trial=trial, step=0)
    assert until(lambda: groups.take() is not None and not group.told)


def test_an_out_of_memory_pack_is_split_and_goes_on(tmp_path):
    (tmp_path / "sweep-1").mkdir()
    layouts, opened = [], []

    def open_group(request, layout):
        layouts.append(layout)
        opened.append(FakeGroup([], request, layout.pack))
        return opened[-1]

    groups = Groups(open_group, lambda request: "base", Layout(1, 4, 4, joined=4), lambda starting: True)
    request = request_of(JOB, tmp_path)
    for name in "0123":
        groups.enter(name, request)
    entered(opened[0], groups, *"0123")
    (failed,) = [e for e in lost_to_memory(groups, opened[0]) if e["event"] == "group_failed"]
    assert failed["at_once"] == 2 and layouts[1] == Layout(1, 2, 4, joined=2)
    assert until(lambda: groups.take() is not None and len(opened[1].line) == 4)

    for name in "123":
        groups.leave(name)
    entered(opened[1], groups, "0")
    events = lost_to_memory(groups, opened[1])  # alone, it fails alone
    assert [(e["event"], e.get("trial")) for e in events if e["event"] == "failed"] == [("failed", "0")]
    assert "memory ran out with this trial alone" in events[-1]["cause"] and not groups.trials
    groups.close(1.0)


def test_a_trial_that_is_out_of_memory_alone_takes_fewer_rows_as_often_as_it_may(standing, tmp_path):
    groups, opened, request = standing
    (tmp_path / "sweep-1").mkdir()
    retry = request.spec.retry.model_copy(update={"oom": 1})
    request = replace(request, spec=request.spec.model_copy(update={"retry": retry}))
    request = replace(request, plan=request.plan.at(1, 8))
    groups.enter("0", request)
    entered(opened[0], groups, "0")
    (failed,) = [e for e in lost_to_memory(groups, opened[0]) if e["event"] == "group_failed"]
    assert failed["rows"] == 4
    assert until(lambda: groups.take() is not None and len(opened) == 2 and bool(opened[1].line))
    assert opened[1].line[0].request.plan.micro_batch_size == 4
    entered(opened[1], groups, "0")
    assert any(e["event"] == "failed" for e in lost_to_memory(groups, opened[1]))
