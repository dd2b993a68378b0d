"""SIGTERM to a worker: a checkpoint at its next step, for all ranks, and the rest as if nothing had been."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from orchestrator.train import preemption
from orchestrator.train.events import Reporter
from orchestrator.train.worker.checkpoint import steps_in
from orchestrator.train.worker.run import train
from tests.ranks import run_on_ranks

from .ends import difference
from .test_ranks import on_rank
from .tiny import job, plan, request


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_signal_calls_what_was_asked_for_and_ends_nothing():
    preemption.listen()
    reporter = Reporter(lambda events: False)
    preemption.when_asked(reporter.request_stop)
    assert not reporter.stop_requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert reporter.stop_requested
    late = Reporter(lambda events: False)  # a signal that came while the worker still imported
    preemption.when_asked(late.request_stop)
    assert late.stop_requested
    for each in (reporter, late):
        each.close()
        assert each.stop_requested  # what the driver answers does not take it back
    preemption.listen()  # the next group of workers in this process
    fresh = Reporter(lambda events: False)
    preemption.when_asked(fresh.request_stop)
    assert not fresh.stop_requested
    fresh.close()


class Told:
    """The reporter of a rank that gets a real SIGTERM when it is asked for the nth time whether to stop."""

    def __init__(self, nth: int | None) -> None:
        self.nth, self.asked, self.is_to_stop = nth, 0, False
        preemption.listen()
        preemption.when_asked(self.request_stop)

    def request_stop(self) -> None:
        self.is_to_stop = True

    @property
    def stop_requested(self) -> bool:
        self.asked += 1
        if self.asked == self.nth:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.is_to_stop

    def emit(self, kind: str, **fields) -> None:
        """Nobody listens."""


def preempted(folder: Path, spec, made_plan, run: str, rank: int):
    torch.set_num_threads(1)
    told = Told(4 if torch.distributed.get_rank() == rank else None)
    return train(request(folder, spec, made_plan, run=run), reporter=told)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_ranks_signal_saves_the_run_of_all(tmp_path, rank):
    spec, two = job(tmp_path, training={"max_steps": 8, "save_steps": 1000}), plan(workers=2, stage=2)
    whole = run_on_ranks(on_rank, 2, tmp_path, spec, two, "whole")
    ends = run_on_ranks(preempted, 2, tmp_path, spec, two, "parts", rank)
    assert [end.is_stopped for end in ends] == [True, True]
    saved = ends[0].steps
    assert 0 < saved < 8 and steps_in(str(tmp_path / "parts")) == [saved]  # no step was lost
    again = run_on_ranks(on_rank, 2, tmp_path, spec, two, "parts")
    assert difference(whole[0], again[0]) == 0.0 and again[0].metrics == whole[0].metrics
