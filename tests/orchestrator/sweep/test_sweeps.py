"""Sweeps on Ray Tune, over groups that train nothing: what is decided, kept, resumed and left behind."""

import json
from pathlib import Path

import pytest
import ray

from orchestrator.errors import Interrupted, LeaseError, OutOfTimeError, TrainingError
from orchestrator.plan.layout import Layout
from orchestrator.sweep import driver
from orchestrator.sweep.account import Account
from orchestrator.sweep.driver import Driver
from orchestrator.sweep.runner import SweepRunner
from orchestrator.sweep.trials import FAILED, FINISHED, RUNNING, STOPPED, read_trials

from .trainers import FakeGroup, request_of

pytestmark = pytest.mark.ray  # Tune's proxies are actors

JOB = """
name: x
model: {base_model: b}
data: {datasets: [{path: a.jsonl}]}
training: {max_steps: 24, eval_steps: 4}
sweep:
  num_trials: 6
  max_concurrent: 3
  searcher: random
  space:
    training.learning_rate: {loguniform: [1e-4, 1e-2]}
    adapter.r: {choice: [4, 8]}
"""
ASHA = JOB.replace("  searcher", "  scheduler: {type: asha, reduction_factor: 2}\n  searcher")


@pytest.fixture(autouse=True)
def connected(local_ray):
    if not ray.is_initialized():
        ray.init(
            address=local_ray.gcs_address, log_to_driver=False, logging_level="ERROR", namespace="raypeft"
        )


class Sweep:
    """One driver's part of a sweep of fakes."""

    def __init__(self, text, folder, *, groups=1, pack=3, fails=()):
        self.story, self.opened, self.events = [], [], []
        self.request = request_of(text, folder)
        sweep = self.request.spec.sweep

        def open_group(request, layout):
            self.opened.append(FakeGroup(self.story, request, layout.pack, fails=fails))
            return self.opened[-1]

        self.runner = SweepRunner(
            open_group,
            lambda request: "one base",
            lambda request, trials: Layout(groups, pack, sweep.max_concurrent),
            lambda request, starting: True,
        )

    def run(self, on_event=lambda sweep, event: None):
        self.runner.start(self.request)
        for event in self.runner.events():
            self.events.append(event)
            on_event(self, event)
        return self.runner.outcome()

    @property
    def trials(self):
        return read_trials(self.request.run_dir)

    def steps(self, number):
        return [step for kind, trial, step in self.story if kind == "step" and trial == number]


def test_all_trials_train_and_the_best_is_what_it_comes_to(tmp_path):
    before = set(ray.util.placement_group_table())
    sweep = Sweep(JOB, tmp_path)
    outcome = sweep.run()
    trials = {trial.number: trial for trial in sweep.trials}
    assert sorted(trials) == list(range(6)) and {trial.state for trial in trials.values()} == {FINISHED}
    chosen = min(trials.values(), key=lambda trial: trial.value("eval_loss"))
    assert outcome.metrics["eval_loss"] == chosen.value("eval_loss") and outcome.adapter_dir.startswith(
        chosen.url
    )
    assert outcome.origin == {
        "sweep": "sweep-1", "trial": chosen.number, "parameters": chosen.parameters, "trials": 6,
    }  # fmt: skip
    assert outcome.spec.training.learning_rate == chosen.parameters["training.learning_rate"]
    assert outcome.spec.sweep is None
    assert all(sweep.steps(number) == list(range(1, 25)) for number in trials)
    assert [report.step for report in chosen.reports] == [4, 8, 12, 16, 20, 24]
    # the adapters of the best and of the latest trial are kept
    assert {each.number for each in trials.values() if each.has_adapter} == {chosen.number, 5}
    folder = tmp_path / "sweep-1"
    for name in ("learning-curves", "parallel-coordinates", "importance"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page and page.count("<tr") == 7
    assert set(ray.util.placement_group_table()) == before


def test_a_stopped_trials_place_is_the_next_ones_within_a_second(tmp_path):
    sweep = Sweep(ASHA.replace("num_trials: 6", "num_trials: 10"), tmp_path)
    sweep.run()
    trials = {trial.number: trial for trial in sweep.trials}
    stopped = [each for each in trials.values() if each.state == STOPPED]
    assert len(trials) == 10 and len(stopped) >= 3
    assert min(trials.values(), key=lambda each: each.value("eval_loss")).state == FINISHED
    told = {(each["trial"], each["state"]): each["t"] for each in sweep.events if each["event"] == "trial"}
    ends = sorted(t for (_, state), t in told.items() if state in (STOPPED, FINISHED))
    begins = sorted(t for (number, state), t in told.items() if state == "started" and number >= 3)
    waits = [begin - max(t for t in ends if t <= begin + 0.5) for begin in begins]
    assert sorted(waits)[len(waits) // 2] < 1.0, waits


def test_a_killed_driver_goes_on_where_it_was(tmp_path):
    first = Sweep(ASHA, tmp_path)

    class Killed(Exception):
        pass

    def kill(sweep, event):
        if event["event"] == "trial" and event["state"] == FINISHED:
            raise Killed

    with pytest.raises(Killed):
        first.run(kill)
    first.runner.stop()  # this process lives on: what its thread has begun is let go of
    first.runner._thread.join(30)
    before = {trial.number: trial for trial in first.trials}
    assert RUNNING in {trial.state for trial in before.values()}
    second = Sweep(ASHA, tmp_path)
    second.run()
    after = {trial.number: trial for trial in second.trials}
    assert sorted(after) == list(range(6))
    for trial in before.values():
        assert after[trial.number].parameters == trial.parameters
        if trial.state in (FINISHED, STOPPED):
            assert second.steps(trial.number) == [] and after[trial.number].reports == trial.reports
        else:
            done = trial.reports[-1].step if trial.reports else 0
            assert not second.steps(trial.number) or second.steps(trial.number)[0] > done
    third = Sweep(ASHA, tmp_path)
    third.run()
    assert third.story == [] and third.opened == []


def test_a_stop_saves_every_trial(tmp_path):
    sweep = Sweep(JOB.replace("max_steps: 24", "max_steps: 100000"), tmp_path)

    def stop(sweep, event):
        begun = {each["trial"] for each in sweep.events if each["event"] == "progress"}
        if len(begun) == 3 and event.get("step", 0) > 10:
            sweep.runner.stop()

    with pytest.raises(Interrupted, match="The same command goes on"):
        sweep.run(stop)
    assert {trial.state for trial in sweep.trials} == {RUNNING}
    saved = [
        json.loads((tmp_path / "sweep-1" / "trials" / each.id / "checkpoints" / "step.json").read_text())
        for each in sweep.trials
    ]
    assert len(saved) == 3 and all(each["step"] for each in saved)
    for each, checkpoint in zip(sweep.trials, saved, strict=True):  # what it measured on its way out is kept
        lines = (tmp_path / "sweep-1" / "trials" / each.id / "metrics.jsonl").read_text().splitlines()
        told = [line["step"] for line in map(json.loads, lines) if line["event"] == "progress"]
        assert told == list(range(1, checkpoint["step"] + 1))
    assert "3 trials by eval_loss (min); 3 have not ended" in report_of(sweep)


def report_of(sweep):
    """The page of a sweep that told of it last, its plots beside it."""
    (told,) = [each for each in sweep.events if each["event"] == "report"]
    folder = Path(told["html"]).parent
    assert {each.name for each in folder.glob("*.png")} == {Path(each).name for each in told["png"]}
    assert len(told["png"]) == 3 and str(folder) == sweep.request.run_dir
    return Path(told["html"]).read_text()


def test_a_sweep_that_was_stopped_before_any_trial_leaves_no_report(tmp_path):
    sweep = Sweep(JOB, tmp_path)
    sweep.runner.stop()
    with pytest.raises(Interrupted):
        sweep.run()
    assert sweep.trials == [] and not (tmp_path / "sweep-1" / "report.html").exists()


def test_an_end_in_between_leaves_a_report_unless_another_driver_has_the_run(tmp_path, monkeypatch):
    Sweep(JOB, tmp_path).run()
    page = tmp_path / "sweep-1" / "report.html"
    for error, leaves in ((LeaseError("another's"), False), (TrainingError("a group failed"), True)):

        def end(driver, stop, error=error):
            raise error

        monkeypatch.setattr(Driver, "run", end)
        page.unlink()
        with pytest.raises(type(error)):
            Sweep(JOB, tmp_path).run()
        assert page.exists() == leaves
        page.touch()


def test_one_failing_trial_fails_alone(tmp_path):
    sweep = Sweep(JOB, tmp_path, fails=(1,))
    sweep.run()
    states = {trial.number: trial.state for trial in sweep.trials}
    assert states == {0: FINISHED, 1: FAILED, 2: FINISHED, 3: FINISHED, 4: FINISHED, 5: FINISHED}
    assert next(trial for trial in sweep.trials if trial.number == 1).cause == "NaN"


def test_all_failing_is_said(tmp_path):
    sweep = Sweep(JOB, tmp_path, fails=range(6))
    with pytest.raises(TrainingError, match=r"none of 6 trials came to a value of eval_loss. The first: NaN"):
        sweep.run()
    assert report_of(sweep).count("failed") >= 6


def test_trials_of_a_lost_group_go_on_from_their_checkpoints(tmp_path):
    died = []

    def die(sweep, event):
        if event["event"] == "progress" and event["step"] == 10 and not died:
            died.append(1)
            sweep.opened[0].die()

    sweep = Sweep(JOB.replace("max_steps: 24", "max_steps: 40"), tmp_path)
    sweep.run(die)
    assert {trial.state for trial in sweep.trials} == {FINISHED} and len(sweep.opened) == 2
    again = [step for kind, _, step in sweep.story if kind == "entered" and step > 0]
    assert again and all(step % 4 == 0 for step in again)
    assert [each["will_retry"] for each in sweep.events if each["event"] == "failure"] == [True]


def test_a_budget_ends_it_with_the_best_until_then(tmp_path, monkeypatch):
    sweep = Sweep(JOB.replace("max_steps: 24", "max_steps: 100000"), tmp_path)

    def used_up(account):  # a clock that does not depend on how busy the machine is
        evaluations = sum(each["event"] == "eval" for each in sweep.events)
        return "sweep.budget.time" if evaluations > 4 else None

    monkeypatch.setattr(Account, "used_up", used_up)
    outcome = sweep.run()
    trials = sweep.trials
    assert {trial.state for trial in trials} == {STOPPED} and 1 <= len(trials) <= 3
    best = min((each for each in trials if each.reports), key=lambda trial: trial.value("eval_loss"))
    assert outcome.origin["trial"] == best.number and outcome.steps >= best.reports[-1].step


def test_a_median_stops_the_worse_half(tmp_path):
    text = JOB.replace("  searcher", "  scheduler: {type: median}\n  searcher").replace(
        "num_trials: 6", "num_trials: 8"
    )
    sweep = Sweep(text, tmp_path)
    sweep.run()
    assert STOPPED in {trial.state for trial in sweep.trials}


def test_a_trial_whose_draws_break_a_rule_together_fails_alone(tmp_path, monkeypatch):
    """Of a large space not every combination is tried before it starts."""
    real = driver.trial_job

    def strict(spec, parameters):
        if parameters.get("adapter.r") == 8:
            raise ValueError("the trial with adapter.r 8 breaks a rule")
        return real(spec, parameters)

    monkeypatch.setattr(driver, "trial_job", strict)
    sweep = Sweep(JOB, tmp_path)
    sweep.run()
    ends = {trial.parameters["adapter.r"]: (trial.state, trial.cause) for trial in sweep.trials}
    assert ends == {4: (FINISHED, None), 8: (FAILED, "the trial with adapter.r 8 breaks a rule")}
    assert len(sweep.trials) == 6


def test_workers_hours_of_a_driver_that_was_killed_count(tmp_path, monkeypatch):
    class Used:
        worker_seconds = 1800.0

    monkeypatch.setattr("orchestrator.sweep.account._LOOKS_S", 0.0)
    monkeypatch.setattr("orchestrator.sweep.account._KEEPS_S", 0.0)
    request = request_of(JOB.replace("  searcher", "  budget: {worker_hours: 0.9}\n  searcher"), tmp_path)
    first = Account(request, Used(), Layout(1, 1, 1))
    assert first.used_up() is None  # and then it is killed
    assert Account(request, Used(), Layout(1, 1, 1)).used_up() == "sweep.budget.worker_hours"


def test_a_budget_that_allows_no_evaluation_says_so(tmp_path):
    sweep = Sweep(JOB.replace("  searcher", "  budget: {time: 0.01}\n  searcher"), tmp_path)
    with pytest.raises(
        OutOfTimeError, match=r"sweep.budget.time was used up before any of \d trials was evaluated"
    ):
        sweep.run()
    assert not sweep.trials or "<table>" in report_of(sweep)
