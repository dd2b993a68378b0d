"""`sweep`: its space is tried against the schema, the methods and the rules before anything starts."""

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.canonical import canonical_hash, load_stored, resolved_yaml
from orchestrator.spec.load import load_job, load_job_text
from orchestrator.spec.space import combinations, dimensions
from orchestrator.spec.trials import count_trials, evaluations, saved_where_evaluated, trial_job

from .jobs import MINIMAL, refused_after_minimal, spec_of

RATE = "training.learning_rate: {loguniform: [1e-5, 1e-3]}"


def sweep(space, more=""):
    lines = "".join(f"    {line}\n" for line in space.splitlines())
    return f"sweep:\n{more}  space:\n{lines}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sweep: {space: {}}", "sweep.space: is empty: every trial would be the same."),
        ("sweep: {metric: eval_loss}", "sweep.space: is required and not given."),
        (sweep("training.learning_rat: {loguniform: [1e-5, 1e-3]}"), "Closest: 'training.learning_rate'."),
        (sweep("learning_rate: {loguniform: [1e-5, 1e-3]}"), "Write it as training.learning_rate."),
        (sweep("adapter.rr: {choice: [4, 8]}"), "lora has no such field. Closest: 'adapter.r'."),
        (sweep("adapter.r: {choice: [4, big]}"), "sweep.space.adapter.r: 'big' is not a whole number."),
        (sweep("adapter.r: {uniform: [4, 32]}"), "uniform draws fractions: write randint, quniform or choice."),
        (sweep("adapter.r: {choise: [4]}"), "is not a distribution. Closest: 'choice'."),
        (sweep("adapter.r: {choice: []}"), "is not a list with something in it."),
        (sweep("adapter.r: [4, 8]"), "is a list. Write adapter.r: {choice: [...]}."),
        (sweep("adapter.r: {randint: [8, 4]}"), "8 to 4 is empty"),
        (sweep("training.learning_rate: {loguniform: [0, 1]}"), "a logarithm needs a beginning above 0"),
        (sweep("training.warmup_ratio: {quniform: [0, 0.2, 0.5]}"), "a step of 0.5 does not fit"),
        (sweep("adapter.r: {quniform: [1, 10, 4]}"), "multiples of 4, and 1 is none. Write such as {quniform: [0"),
        (sweep("adapter.r: {choice: [4, 8, 4]}"), "holds 4 twice: the same trial would run twice."),
        (sweep("paired: [{adapter.r: 4}, {adapter.r: 4}]"), "the same trial would run twice."),
        (sweep("adapter.r: {randint: [4, 8]}", "  num_trials: 5\n"), "the space has 4 combinations"),
        (sweep("training.warmup_ratio: {uniform: [0.5, 1.5]}"), "1.5 is not a number from 0 to 1."),
        (sweep("resources.num_workers: {choice: [1, 2]}"), "resources holds for all trials of a sweep."),
        (sweep("model.base_model: {choice: [a, b]}"), "model.base_model holds for all trials of a sweep."),
        (sweep("paired: [{adapter.r: 4}, {adapter.alpha: 4}]"), "its mappings set different keys."),
        (sweep("adapter.r: {choice: [4]}\npaired: [{adapter.r: 4}]"), "adapter.r is drawn by adapter.r already."),
        (sweep(RATE, "  metric: eval_los\n"), "sweep.metric: 'eval_los' is not measured by this job. Closest"),
        (sweep(RATE, "  searcher: grid\n"), "loguniform has no end of values"),
        (sweep("adapter.r: {grid: [4, 8]}", "  searcher: optuna\n"), "searcher: optuna chooses."),
        (sweep("adapter.r: {choice: [4, 8]}", "  num_trials: 3\n"), "the space has 2 combinations"),
        (sweep(RATE, "  budget: {time: 0}\n"), "a budget of zero: no trial would start."),
        (sweep(RATE, "  budget: {trials: 0}\n"), "0 is not a whole number above 0."),
        (sweep(RATE, "  budget: {worker_hours: 0}\n"), "0 is not a number above 0."),
        (sweep(RATE, "  scheduler: asha\n"), "asha has nothing to compare"),
        (sweep(RATE, "  scheduler: ashas\n"), "sweep.scheduler: 'ashas' is not a scheduler. Closest: 'asha'."),
        (sweep(RATE, "  pack: 0\n"), "sweep.pack"),
        (sweep(RATE, "  metric: train_loss\n  scheduler: median\n"), "eval_loss alone is measured"),
        (sweep(RATE, "  metric: EVAL_LOSS\n"), "'EVAL_LOSS' is not measured by this job. Closest: 'eval_loss'."),
        (sweep(RATE, "  searcher: Optuna\n"), "Closest: 'optuna'."),
        (sweep(RATE, "  scheduler: {type: median, reduction_factor: 2}\n"), "median does not read it. Remove it, or"),
        (sweep(RATE, "  scheduler: {grace_period: 2}\n"), "sweep.scheduler.grace_period: none does not read it."),
        (sweep(RATE, "  scheduler: false\n"), "false is not a mapping. Its keys: type, grace_period"),
        ("sweep: asha", "'asha' is not a mapping. Its keys: metric, mode"),
        (sweep("adapter.r: {choice: [4, 4.0]}"), "holds 4.0 twice: the same trial would run twice."),
        (sweep("adapter.r: {quniform: [4, 16, 0]}"), "a step of 0 leads nowhere. Write one above 0."),
        (sweep("adapter.r: {quniform: [4, 16, -4]}"), "a step of -4 leads nowhere."),
        (sweep("deepspeed: {choice: [zero2, zero9]}"), "sweep.space.deepspeed.choice.1: 'zero9' is neither a stage"),
        (sweep("paired: [{deepspeed: zeor3}]"), "'zeor3' is neither a stage nor a path to a .json file. Closest: 'ze"),
        (sweep("paired: [{adapter.r: {choice: [4, 8]}}]"), "adapter.r: is drawn by itself, and paired holds values"),
        (
            sweep("training.global_batch_size: {choice: [4]}\ntraining.gradient_accumulation_steps: {choice: [2]}"),
            "training.gradient_accumulation_steps and training.global_batch_size, which is drawn too, say the same.",
        ),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_told_with_its_place(text, message):
    said = refused_after_minimal(text)
    assert message in said and said.startswith("jobs/x.yaml:")


def test_a_combination_that_the_rules_refuse():
    text = sweep("model.load_in_4bit: {choice: [true, false]}\nmodel.load_in_8bit: {choice: [true, false]}")
    assert "sweep.space.model.load_in_8bit: true beside model.load_in_4bit: true." in refused_after_minimal(
        text
    )
    text = "training: {global_batch_size: 8}\n" + sweep("training.micro_batch_size: {choice: [2, 3]}")
    said = refused_after_minimal(text)
    assert "the trial with training.micro_batch_size 3" in said and "The nearest that do: 6 or 9." in said
    text = sweep("adapter.type: {choice: [lora, ia3]}\nadapter.r: {choice: [4, 8]}")
    assert "ia3 has no such field" in refused_after_minimal(text)


def test_without_rows_to_evaluate_nothing_is_compared():
    text = "model: {base_model: b}\ndata: {datasets: [{path: a.jsonl}], val_set_size: 0}\n" + sweep(RATE)
    with pytest.raises(Exception, match=r"Nothing is evaluated: set data.val_set_size above 0"):
        load_job_text(text, "jobs/x.yaml")


def test_methods_may_differ_by_pairs():
    spec = spec_of(
        sweep(
            "paired:\n- {adapter.type: lora, training.learning_rate: 1e-3}\n"
            "- {adapter.type: ia3, training.learning_rate: 1e-2}",
            "  searcher: grid\n",
        )
    )
    jobs = [trial_job(spec, each) for each in combinations(dimensions(spec.sweep.space))]
    assert [(job.adapter.type, job.training.learning_rate) for job in jobs] == [("lora", 1e-3), ("ia3", 1e-2)]
    assert all(job.sweep is None and job.deploy is None for job in jobs)


def test_a_key_that_stands_for_another_takes_its_place():
    spec = spec_of("training: {gradient_accumulation_steps: 2, evals_per_epoch: 4}\n" + sweep(RATE))
    job = trial_job(spec, {"training.global_batch_size": 8, "training.eval_steps": 5})
    assert job.training.gradient_accumulation_steps is None and job.training.evals_per_epoch is None
    assert (job.training.global_batch_size, job.training.eval_steps) == (8, 5)


def test_a_trial_is_saved_where_it_is_evaluated_unless_its_job_says_when():
    for said, saved in (
        ("eval_steps: 4", (4, None)),
        ("evals_per_epoch: 8", (None, 8)),
        ("eval_steps: 4, saves_per_epoch: 2", (None, 2)),
        ("evals_per_epoch: 8, save_steps: 50", (50, None)),
        ("num_epochs: 2", (None, None)),
    ):
        training = saved_where_evaluated(spec_of(f"training: {{{said}}}")).training
        assert (training.save_steps, training.saves_per_epoch) == saved, said


def test_how_many_trials():
    grid = sweep("adapter.r: {choice: [4, 8]}\ntraining.seed: {grid: [1, 2, 3]}", "  searcher: grid\n")
    assert count_trials(spec_of(grid).sweep) == 6
    assert count_trials(spec_of(sweep(RATE)).sweep) == 10
    assert count_trials(spec_of(sweep("adapter.r: {choice: [4, 8]}")).sweep) == 2
    assert count_trials(spec_of(sweep(RATE, "  num_trials: 9\n  budget: {trials: 4}\n")).sweep) == 4


def test_how_often_a_trial_is_evaluated():
    assert evaluations(spec_of("training: {num_epochs: 2, evals_per_epoch: 4}")) == 8
    assert evaluations(spec_of("training: {max_steps: 25, eval_steps: 10}")) == 3
    assert evaluations(spec_of("training: {eval_steps: 10}")) is None


def test_a_scheduler_has_steps_to_compare_by():
    text = "training: {evals_per_epoch: 4}\n" + sweep(RATE, "  scheduler: {type: asha, grace_period: 2}\n")
    assert spec_of(text).sweep.scheduler.grace_period == 2
    said = refused_after_minimal(text.replace("grace_period: 2", "grace_period: 4"))
    assert "from evaluation 4 on" in said and "Write training.evals_per_epoch: 16" in said


def test_a_sweep_is_set_and_inherited_key_by_key(tmp_path):
    (tmp_path / "job.yaml").write_text(MINIMAL)
    (tmp_path / "sweep.yaml").write_text("extends: job.yaml\n" + sweep(RATE))
    override = "sweep.space.adapter.r={choice: [4, 8]}"
    again = "sweep.space.training.learning_rate={choice: [1e-4, 1e-3]}"
    spec = load_job(tmp_path / "sweep.yaml", [override, again, "sweep.num_trials=4"]).spec
    assert spec.sweep.space == {
        "training.learning_rate": {"choice": [1e-4, 1e-3]},
        "adapter.r": {"choice": [4, 8]},
    }


def test_less_or_more_is_better_by_the_metrics_name():
    assert spec_of(sweep(RATE)).sweep.direction == "min"
    text = "eval: {metrics: [exact_match]}\n" + sweep(RATE, "  metric: exact_match\n")
    assert spec_of(text).sweep.direction == "max"
    assert spec_of(text.replace("  metric", "  mode: min\n  metric")).sweep.direction == "min"
    assert spec_of(text).sweep.is_better(0.9, 0.5) and not spec_of(text).sweep.is_better(float("nan"), 0.5)


def test_deepspeed_files_that_a_sweep_draws_are_read(tmp_path):
    """A job is whole without them, on any machine."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    path = tmp_path / "x.yaml"
    path.write_text(MINIMAL + sweep("deepspeed: {choice: [zero3, ds.json]}\npaired: [{training.seed: 3}]"))
    spec = load_job(path).spec
    jobs = [trial_job(spec, each) for each in combinations(dimensions(spec.sweep.space))]
    assert [job.deepspeed for job in jobs] == ["zero3", {"zero_optimization": {"stage": 1}}]
    path.write_text(MINIMAL + sweep("paired: [{deepspeed: gone.json}, {deepspeed: zero3}]"))
    with pytest.raises(
        SpecError, match=r"x\.yaml:5 sweep\.space\.paired\.0\.deepspeed: 'gone\.json': no such file"
    ):
        load_job(path)


def test_a_sweep_reads_back_as_it_was_stored():
    spec = spec_of(
        sweep(RATE + "\npaired: [{adapter.r: 4, training.seed: 1}, {adapter.r: 8, training.seed: 2}]")
    )
    again = load_stored(resolved_yaml(spec))
    assert again.sweep == spec.sweep and canonical_hash(again) == canonical_hash(spec)
    assert canonical_hash(spec) != canonical_hash(spec_of())
    assert load_job_text(resolved_yaml(spec), "jobs/x.yaml").spec.sweep == spec.sweep
