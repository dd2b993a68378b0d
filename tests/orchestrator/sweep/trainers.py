"""Warm groups that train nothing: a trial's loss is a function of its learning rate and its steps. What it has done is
in its folder, as a real one's."""

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from orchestrator.objects import local_path
from orchestrator.plan import make_plan
from orchestrator.runner import TrainRequest
from orchestrator.spec.load import load_job_text
from orchestrator.store import RunStore

STEP_S = 0.01


def request_of(text: str, folder: Path) -> TrainRequest:
    """What the service asks a runner for; the run's folder is there."""
    spec = load_job_text(text, "jobs/x.yaml").spec
    url = str(folder / "sweep-1")
    return TrainRequest(spec, make_plan(spec, None, None), url, "sweep-1", "data")


def loss(rate: float, step: int) -> float:
    """The best rate is 1e-3; more steps are better."""
    return abs(rate - 1e-3) * 1000 + 1.0 / step


@dataclass
class Entered:
    """A trial on a fake group."""

    name: str
    request: TrainRequest
    step: int


class FakeGroup:
    """`sweep.groups.WarmGroup` in this process."""

    def __init__(self, story: list, request: TrainRequest, at_once: int, *, fails=()) -> None:
        self.story, self.at_once, self.fails = story, at_once, fails
        self.workers = request.plan.num_workers
        self.line: list[Entered] = []
        self.told: list[dict] = []
        self.lock, self.changed = threading.RLock(), threading.Condition()
        self.is_alive = True
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()
        self.tell("ready", seconds=0.0, message="ready")

    def tell(self, kind, /, **fields):
        with self.changed:
            self.told.append({"event": kind, "t": time.time(), **fields})
            self.changed.notify_all()

    def enter(self, trial, request):
        folder = local_path(request.run_dir)
        done = folder / "checkpoints" / "step.json"
        step = json.loads(done.read_text())["step"] if done.exists() else 0
        with self.lock:
            self.line.append(Entered(trial, request, step))
        self.story.append(("entered", int(trial), step))

    def leave(self, trial, *, save=True):
        with self.lock:
            found = next((each for each in self.line if each.name == trial), None)
            if found is None:
                return
            self.line.remove(found)
        if save:
            self._save(found)
        self.story.append(("left", int(trial), found.step))
        self.tell("left", trial=trial, step=found.step)

    def events(self, timeout_s=1.0):
        with self.changed:
            if not self.told and self.is_alive:
                self.changed.wait(timeout_s)
            found, self.told = self.told, []
            return found

    def close(self, timeout_s=30.0):
        for each in list(self.line):
            self.leave(each.name)
        self.is_alive = False

    def die(self):
        """All trials are lost but for their checkpoints."""
        with self.lock:
            lost, self.line = [each.name for each in self.line], []
        self.tell("group_failed", kind="worker lost", cause="killed", rank=0, trials=lost)
        self.is_alive = False

    def _save(self, trial):
        folder = local_path(trial.request.run_dir)
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "step.json").write_text(json.dumps({"step": trial.step}))

    def _train(self):
        while self.is_alive:
            time.sleep(STEP_S)
            with self.lock:
                inside = self.line[: self.at_once]
            for trial in inside:
                self._step(trial)

    def _step(self, trial):
        training = trial.request.spec.training
        if trial.step < training.max_steps:  # else it left after its last step, and has its end before it
            trial.step += 1
            self.story.append(("step", int(trial.name), trial.step))
        if int(trial.name) in self.fails and trial.step == 3:
            with self.lock:
                self.line.remove(trial)
            self.tell(
                "failed", trial=trial.name, kind="not_finite", error="NotFiniteError", cause="NaN", step=3
            )
            return
        self.tell(
            "progress", trial=trial.name, step=trial.step, total_steps=training.max_steps, epoch=0, loss=1.0,
            learning_rate=1.0, grad_norm=1.0, tokens_per_s=1.0, eta_s=1.0,
        )  # fmt: skip
        metrics = {"eval_loss": loss(training.learning_rate, trial.step)}
        is_last = trial.step == training.max_steps
        if is_last or (training.save_steps and trial.step % training.save_steps == 0):
            self._save(trial)
        if is_last or trial.step % training.eval_steps == 0:
            self.tell("eval", trial=trial.name, step=trial.step, metrics=metrics)
        if trial.step >= training.max_steps:
            with self.lock:
                if trial not in self.line:
                    return
                self.line.remove(trial)
            folder = local_path(trial.request.run_dir) / "final"
            folder.mkdir(exist_ok=True)
            (folder / "adapter_config.json").write_text("{}")
            end = {
                "steps": trial.step, "is_stopped": False, "metrics": {**metrics, "train_loss": 1.0},
                "adapter_dir": str(folder), "train_rows": "t", "eval_rows": "e", "question": None,
            }  # fmt: skip
            self.tell("finished", trial=trial.name, end=end)


def trials_store(request: TrainRequest) -> RunStore:
    return RunStore(f"{request.run_dir}/trials")
