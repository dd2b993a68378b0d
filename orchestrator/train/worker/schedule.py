"""When things happen in a run: learning rate, checkpoints, evaluations. Pure functions of the step.

Steps count from 1. The rates are those of `transformers.get_scheduler`, written from their formulas.
"""

from __future__ import annotations

import math

from orchestrator.spec.job import TrainingSpec


def num_warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Steps over which the rate rises from zero, rounded up."""
    return math.ceil(total_steps * warmup_ratio)


def learning_rate(step: int, total_steps: int, training: TrainingSpec) -> float:
    """The rate of optimizer step `step` in 1..total_steps.

    The first warm-up step has rate zero, as in transformers: the rate rises from zero and reaches its peak at
    the first step after the warm-up.
    """
    done = step - 1
    warmup = num_warmup_steps(total_steps, training.warmup_ratio)
    if done < warmup:
        return training.learning_rate * done / max(1, warmup)
    progress = (done - warmup) / max(1, total_steps - warmup)
    return training.learning_rate * _decay(training.lr_scheduler, progress)


def _decay(kind: str, progress: float) -> float:
    if kind == "linear":
        return max(0.0, 1.0 - progress)
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return 1.0


def is_due(step: int, steps_per_epoch: int, every: int | None, per_epoch: int | None) -> bool:
    """Whether something that happens `every` so many steps, or `per_epoch` times an epoch, happens after
    `step`.

    Neither given: once per epoch, after its last step. More times per epoch than it has steps: after each
    step.
    """
    if every is not None:
        return step % every == 0
    times = min(per_epoch or 1, steps_per_epoch)
    within = (step - 1) % steps_per_epoch + 1
    return within * times // steps_per_epoch > (within - 1) * times // steps_per_epoch


def saves_at(step: int, steps_per_epoch: int, training: TrainingSpec) -> bool:
    """Whether a checkpoint is due after `step`."""
    return is_due(step, steps_per_epoch, training.save_steps, training.saves_per_epoch)


def evaluates_at(step: int, steps_per_epoch: int, training: TrainingSpec) -> bool:
    """Whether an evaluation is due after `step`."""
    return is_due(step, steps_per_epoch, training.eval_steps, training.evals_per_epoch)
