"""How much parameters matter, where the answer is known; and that it comes for lists of any length."""

from __future__ import annotations

import random

from orchestrator.spec.load import load_job_text
from orchestrator.sweep.importance import importances
from orchestrator.sweep.trials import FINISHED, Report, Trial

RATES = [10**-number for number in range(2, 34)]
JOB = f"""
model: {{base_model: b}}
data: {{datasets: [{{path: d.jsonl, type: completion}}], val_set_size: 8}}
adapter: {{type: lora}}
training: {{max_steps: 4, learning_rate: 1e-3}}
sweep:
  num_trials: 64
  space:
    training.learning_rate: {{choice: {RATES}}}
    adapter.lora_alpha: {{choice: {list(range(1, 40))}}}
    adapter.lora_dropout: {{uniform: [0.0, 0.5]}}
"""


def test_the_parameter_that_decides_is_found_among_long_lists():
    sweep, draw, trials = load_job_text(JOB, "jobs/many.yaml").spec.sweep, random.Random(0), []
    for number in range(64):
        drawn = {
            "training.learning_rate": draw.randrange(len(RATES)),
            "adapter.lora_alpha": draw.randrange(39),
            "adapter.lora_dropout": draw.uniform(0.0, 0.5),
        }
        value = abs(drawn["training.learning_rate"] - 9) + 0.5 * drawn["adapter.lora_dropout"]
        trials.append(Trial(number, "", "", FINISHED, {}, drawn, (Report(4, {"eval_loss": value}),)))
    shares = importances(sweep, trials)
    assert set(shares) == set(trials[0].drawn) and abs(sum(shares.values()) - 1) < 1e-6
    assert shares["training.learning_rate"] > 0.9 and next(iter(shares)) == "training.learning_rate"


def test_nothing_is_said_of_few_trials():
    sweep = load_job_text(JOB, "jobs/many.yaml").spec.sweep
    drawn = {"training.learning_rate": 1, "adapter.lora_alpha": 2, "adapter.lora_dropout": 0.1}
    few = [Trial(n, "", "", FINISHED, {}, drawn, (Report(4, {"eval_loss": float(n)}),)) for n in range(3)]
    assert importances(sweep, few) == {} == importances(sweep, few * 4)
