"""A sweep's trials as a user reads them."""

from orchestrator.cli import sweeps
from orchestrator.spec.sweep import SweepSpec
from orchestrator.sweep import table
from orchestrator.sweep.result import SweepResult
from orchestrator.sweep.trials import FAILED, FINISHED, Report, Trial

SWEEP = SweepSpec(space={"adapter": {"choice": [{"type": "lora", "r": 4}, {"type": "ia3"}]}})
TRIALS = (
    Trial(
        0, "a", "u", FINISHED, {"adapter": {"type": "lora", "r": 4}}, reports=(Report(8, {"eval_loss": 2.0}),)
    ),
    Trial(1, "b", "u", FAILED, {"adapter": {"type": "ia3"}}, cause="no layer is called so [q]"),
)


def test_a_section_that_was_drawn_whole_is_read_as_words():
    assert [row[2] for row in table.rows(SWEEP, TRIALS)] == ["type lora, r 4", "type ia3"]


def test_a_failed_trials_reason_stands_below_the_table(capsys):
    sweeps.show_sweep(SweepResult("x", "done", SWEEP, TRIALS, 2))
    assert "trial 1 failed: no layer is called so [q]" in capsys.readouterr().out
