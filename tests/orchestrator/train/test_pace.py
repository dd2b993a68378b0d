"""Which way of a round is taken, by seconds that are given."""

from __future__ import annotations

from orchestrator.train.worker.pace import Kind, Mode, Pace


def run(pace: Pace, kind: Kind, together: float, turns: float, rounds: int = 10) -> list[Mode]:
    """The ways that were taken where a round takes so long."""
    taken: list[Mode] = []
    for _ in range(rounds):
        mode = pace.mode(kind)
        taken.append(mode)
        if pace.is_measuring(kind):
            pace.took(kind, mode, together if mode == "together" else turns)
    return taken


def test_what_is_clearly_slower_is_tried_twice():
    taken = run(Pace(), Kind("lora", 3), together=2.0, turns=1.0)
    assert taken.count("together") == 2 and set(taken[4:]) == {"turns"}


def test_what_is_close_is_measured_to_the_end():
    taken = run(Pace(), Kind("lora", 3), together=0.95, turns=1.0)
    assert taken[:6].count("turns") == 3 and set(taken[6:]) == {"together"}


def test_what_holds_for_more_runs_is_not_measured_again():
    pace = Pace()
    run(pace, Kind("lora", 4), together=2.0, turns=1.0)
    assert run(pace, Kind("lora", 2), 0.1, 1.0) == ["turns"] * 10
    assert "together" in run(pace, Kind("lora", 5), 0.1, 1.0)
    assert "together" in run(pace, Kind("oft", 2), 0.1, 1.0)
    run(pace, Kind("ia3", 2), together=1.0, turns=2.0)
    assert run(pace, Kind("ia3", 4), 9.0, 1.0) == ["together"] * 10
