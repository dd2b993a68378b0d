"""A warm group on Ray: runs enter, step, leave, fail, follow each other; it dies, and they go on in another."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.runner import TrainRequest
from orchestrator.train.driver.warm import GroupDied, WarmGroup
from orchestrator.train.packing import Packing
from orchestrator.train.worker.checkpoint import steps_in

from .packs import Heard, alone, apart
from .test_ray import KEEPER, settled, train_workers
from .tiny import job, plan, request

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

LONG = {"num_epochs": 200, "save_steps": 5, "eval_steps": 1000, "learning_rate": 1e-4}


@pytest.fixture(scope="module")
def session(local_ray) -> Iterator[None]:
    ray.init(address=local_ray.gcs_address, log_to_driver=False, logging_level="ERROR")
    KEEPER[:] = [local_ray.keeper_pid]
    yield
    ray.shutdown()


class Listener:
    """All that a group tells, by run."""

    def __init__(self, group: WarmGroup) -> None:
        self.group = group
        self.heard: dict[str, Heard] = {}
        self.own: list[dict[str, Any]] = []

    def until(self, happened: Callable[[], bool], deadline_s: float = 120) -> None:
        end = time.monotonic() + deadline_s
        while not happened():
            assert time.monotonic() < end, (self.own, self.heard)
            for event in self.group.events(0.5):
                name = event.get("trial")
                if name is None:
                    self.own.append(event)
                else:
                    self.heard.setdefault(name, Heard()).events.append(event)

    def has(self, name: str, kind: str) -> bool:
        return name in self.heard and bool(self.heard[name].of(kind))

    def steps(self, name: str) -> int:
        return len(self.heard[name].of("progress")) if name in self.heard else 0


def run_of(folder: Path, name: str, seed: int = 1, **training: Any) -> TrainRequest:
    base = {"learning_rate": 1e-3, "seed": seed}
    spec = job(folder, rows=9, adapter={"lora_dropout": 0.2}, training={**base, **training})
    return request(folder, spec, plan(micro=2, stage=0), run=name)


def test_runs_come_and_go_on_a_warm_base(session, tmp_path):
    base = run_of(tmp_path, "group")
    with WarmGroup(base, Packing("turns", places=2)) as group:
        told = Listener(group)
        first, second = run_of(tmp_path, "first", num_epochs=2), run_of(tmp_path, "second", 2, **LONG)
        third = run_of(tmp_path, "third", 3)
        bad = run_of(tmp_path, "bad", learning_rate=1e30)
        for name, each in {"first": first, "second": second, "third": third, "bad": bad}.items():
            group.enter(name, each)
        with pytest.raises(ValueError, match="already"):
            group.enter("first", first)
        assert set(group.trials) == {"first", "second", "third", "bad"}
        told.until(
            lambda: told.has("third", "finished") and told.has("bad", "failed") and told.steps("second") > 8
        )
        assert told.own[0]["event"] == "state" and "ready" in [each["event"] for each in told.own]
        assert told.heard["bad"].of("failed")[0]["kind"] == "not_finite"
        # a place that becomes free is taken by the next in line, which steps within a second
        freed = told.heard["first"].of("finished")[0]["t"]
        assert (
            told.heard["third"].of("progress")[0]["t"] - freed < 3
        )  # seven others may share these two cores
        group.leave("second")
        told.until(lambda: told.has("second", "left"))
        left = told.heard["second"].of("left")[0]
        assert steps_in(second.run_dir)[0] == left["step"] and not group.trials
        group.enter("again", run_of(tmp_path, "again", 3))
        told.until(lambda: told.has("again", "finished"))
    assert settled() == [] and not group.is_alive and group.failure is None
    with pytest.raises(GroupDied):
        group.enter("late", third)
    for name, each in {"first": first, "third": third}.items():
        assert apart(told.heard[name], alone(replace(each, run_dir=f"{each.run_dir}-alone"))) == 0
    assert apart(told.heard["again"], told.heard["third"]) == 0


@pytest.mark.matrix  # two groups of two workers start
def test_a_group_of_two_that_loses_a_worker_dies_and_its_runs_go_on_in_another(session, tmp_path):
    two = plan(workers=2, micro=1, stage=2)
    asked = {name: run_of(tmp_path, name, seed, **LONG, max_steps=40) for seed, name in enumerate("ab")}
    runs = {name: replace(each, plan=two) for name, each in asked.items()}
    group = WarmGroup(replace(run_of(tmp_path, "group"), plan=two), Packing("together"))
    told = Listener(group)
    for name, each in runs.items():
        group.enter(name, each)
    told.until(lambda: told.steps("a") > 12 and told.steps("b") > 12)
    os.kill(train_workers()[0], signal.SIGKILL)
    told.until(lambda: any(each["event"] == "group_failed" for each in told.own))
    failed = told.own[-1]
    assert set(failed["trials"]) == {"a", "b"} and failed["kind"] == "worker lost" and group.failure
    assert not group.is_alive
    group.close()
    with WarmGroup(replace(run_of(tmp_path, "group"), plan=two)) as another:
        rest = Listener(another)
        for name, each in runs.items():
            another.enter(name, each)
        rest.until(lambda: all(rest.has(name, "finished") for name in runs))
    for name in runs:
        assert rest.heard[name].of("entered")[0]["step"] >= 10
        assert rest.heard[name].of("finished")[0]["end"]["steps"] == 40
    assert settled() == []


@pytest.mark.matrix  # as the above, for one line
def test_a_base_that_is_not_there_is_told(session, tmp_path):
    base = run_of(tmp_path, "group")
    spec = base.spec.model_copy(
        update={"model": base.spec.model.model_copy(update={"base_model": str(tmp_path / "no")})}
    )
    group = WarmGroup(replace(base, spec=spec))
    told = Listener(group)
    told.until(lambda: bool(told.own) and told.own[-1]["event"] == "group_failed")
    assert "no" in told.own[-1]["cause"] and told.own[-1]["kind"] == "config"
    group.close()
