"""What steps took says how much more a step may do."""

from __future__ import annotations

from orchestrator.serve.engines.step_cost import StepCost


def noted(seconds_of, *sizes: int) -> StepCost:
    cost = StepCost()
    for tokens in sizes:
        cost.took(tokens, seconds_of(tokens))
    return cost


def test_tokens_that_may_join_follow_from_what_steps_of_that_size_took():
    sizes = (1, 2, 4, 8, 16, 32, 64, 128)
    # Cheap up to 15 tokens, then half as long again, as half-precision products are on a CPU.
    steps = noted(lambda tokens: 0.1 if tokens < 16 else 0.15, *sizes)
    assert steps.addable(2, 0.25) == 8
    # A price for each token, and hardly one.
    assert noted(lambda tokens: 0.1 * (1 + 0.01 * tokens), *sizes).addable(2, 0.25) == 16
    assert noted(lambda tokens: 0.1 * (1 + 0.001 * tokens), *sizes).addable(2, 0.25) == 256
    # One slow step among many says nothing.
    for _ in range(3):
        steps.took(2, 0.1)
        steps.took(9, 0.1)
    steps.took(2, 9.0)
    steps.took(9, 9.0)
    assert steps.addable(2, 0.25) == 8


def test_a_size_that_never_ran_is_tried_one_at_a_time():
    steps = StepCost()
    assert steps.addable(2, 0.25) == 4
    steps.took(2, 0.1)
    assert steps.addable(2, 0.25) == 8
    steps.took(10, 0.11)
    assert steps.addable(2, 0.25) == 16
    steps.took(18, 0.2)
    assert steps.addable(2, 0.25) == 8


def test_what_late_prompts_take_does_not_make_it_more():
    steps = noted(lambda tokens: 0.1 * (1 + 0.05 * tokens), 1, 2, 4, 8, 16, 32)
    before = steps.addable(3, 0.25)
    for _ in range(100):
        steps.took(3 + before, 0.1 * (1 + 0.05 * (3 + before)))
    assert steps.addable(3, 0.25) == before == 4
