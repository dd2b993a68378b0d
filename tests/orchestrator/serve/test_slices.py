"""Work between steps: a little at a time, one piece of work after the other, each whole before it is told."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from orchestrator.serve.engines.slices import Slices
from peft_dist.pauses import pause, pausing


def of(seen: list, name: str, pieces: int):
    def work() -> str:
        for number in range(pieces):
            seen.append((name, number))
            pause()
        return name

    return work


def test_work_is_done_while_it_is_given_time_and_one_after_the_other():
    woken, seen = [], []
    slices = Slices(lambda: woken.append(1))
    assert not slices.give(0.0) and not slices.has_work
    first, second = slices.submit(of(seen, "a", 3)), slices.submit(of(seen, "b", 2))
    assert len(woken) == 2 and slices.has_work and not seen
    # No time is one piece each.
    after = []
    while slices.give(0.0):
        after.append(list(seen))
    assert [len(each) for each in after[:3]] == [1, 2, 3]
    assert seen == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert (first.result(1), second.result(1)) == ("a", "b")


def test_much_time_is_all_of_it():
    seen: list = []
    slices = Slices(lambda: None)
    done = slices.submit(of(seen, "a", 100))
    assert slices.give(60.0) and done.result(1) == "a" and len(seen) == 100 and not slices.has_work


def test_what_fails_or_is_cancelled_keeps_nobody_waiting():
    slices = Slices(lambda: None)

    def fails():
        pause()
        raise ValueError("no")

    failing, gone, last = slices.submit(fails), slices.submit(lambda: 1), slices.submit(lambda: 2)
    assert gone.cancel()
    while slices.give(1.0):
        pass
    assert last.result(1) == 2
    with pytest.raises(ValueError, match="no"):
        failing.result(1)


def test_at_the_end_what_waits_fails_and_what_began_is_finished():
    seen: list = []
    slices = Slices(lambda: None)
    begun, waits = slices.submit(of(seen, "a", 3)), slices.submit(of(seen, "b", 3))
    assert slices.give(0.0) and len(seen) == 1
    slices.end(RuntimeError("closed"))
    assert begun.result(5) == "a"
    for failed in (waits, slices.submit(of(seen, "c", 1))):
        with pytest.raises(RuntimeError, match="closed"):
            failed.result(1)
    assert seen == [("a", 0), ("a", 1), ("a", 2)]


def test_a_pause_is_of_one_thread():
    called: list[str] = []
    told: Future[None] = Future()

    def elsewhere() -> None:
        pause()
        told.set_result(None)

    with pausing(lambda: called.append("outer")):
        with pausing(lambda: called.append("inner")):
            pause()
        pause()
        threading.Thread(target=elsewhere).start()
        told.result(5)
    pause()
    assert called == ["inner", "outer"]


def test_a_slice_ends_with_its_time_on_a_core_too():
    seen: list = []
    slices = Slices(lambda: None)
    slices.submit(of(seen, "a", 3))
    assert slices.give(60.0, 0.0) and len(seen) == 1
    assert slices.give(60.0) and len(seen) == 3
