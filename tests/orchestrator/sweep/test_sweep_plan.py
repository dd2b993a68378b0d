"""What the plan of a sweep says of trials that do not share a base, before anything starts."""

import pytest

from orchestrator.cluster import ClusterFacts, NodeFacts
from orchestrator.errors import SpecError
from orchestrator.plan.layout import Layout
from orchestrator.plan.model_sizes import sizes_of
from orchestrator.plan.sweep import SweepPlan, make_sweep_plan, trial_plan
from orchestrator.plan.sweep_time import START_S
from orchestrator.spec.load import load_job_text
from orchestrator.spec.sharing import base_key
from orchestrator.spec.trials import trial_job

JOB = """
name: x
model: {{base_model: b}}
data: {{datasets: [{{path: a.jsonl}}]}}
training: {{max_steps: 24{training}}}
sweep:
  num_trials: 4
  searcher: grid
  pack: {pack}
  space: {{training.learning_rate: {{choice: [1e-3, 1e-4]}}, {space}}}
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
}
TENSORS = {"model.layers.0.self_attn.q_proj.weight": ("F32", (8, 8)), "lm_head.weight": ("F32", (16, 8))}
SEEDS = "training.seed: {choice: [1, 2]}"


def planned(config=CONFIG, tensors=TENSORS, *, training="", pack="auto", space=SEEDS) -> SweepPlan:
    spec = load_job_text(JOB.format(training=training, pack=pack, space=space), "jobs/x.yaml").spec
    return make_sweep_plan(spec, None, sizes_of(config, tensors))


def test_trials_share_a_base():
    plan = planned()
    assert plan.layout == Layout(1, 4, 4) and plan.trial.alone is None
    assert not any("pack" in note for note in plan.notes)


NORM = {**TENSORS, "model.norm.running_mean": ("F32", (8,))}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"config": {**CONFIG, "output_router_logits": True}}, "router's balance loss"),
        ({"config": {**CONFIG, "text_config": {"output_router_logits": True}}}, "router's balance loss"),
        ({"config": {**CONFIG, "model_type": "switch_transformers"}}, "so many tokens of a batch"),
        ({"tensors": NORM}, "batch norm"),
        ({"tensors": NORM, "pack": "4"}, "batch norm"),
        ({"training": ", base_dropout: true"}, "base_dropout"),
    ],
)
def test_what_mixes_rows_is_not_packed_and_the_plan_says_so(given, why):
    plan = planned(**given)
    assert plan.layout == Layout(1, 1, 1) and why in plan.trial.alone
    assert plan.notes[0].startswith("Not packed: ") and why in plan.notes[0]
    assert plan.to_dict()["trial"]["alone"] == plan.trial.alone


def test_base_dropout_refuses_a_number_of_trials_to_pack():
    with pytest.raises(SpecError, match=r"sweep.pack.*base_dropout"):
        planned(training=", base_dropout: true", pack="2")


def test_some_of_the_trials_have_bases_of_their_own():
    space = "adapter.init_lora_weights: {choice: [true, corda]}"
    plan = planned(space=space)
    said = " ".join(plan.notes)
    assert plan.layout.pack == 4 and plan.trial.alone is None
    assert "not packed: init_lora_weights: corda" in said and "loads one of its own" in said


def test_trials_of_another_kind_of_base_are_counted():
    plan = planned(space="training.precision: {choice: [fp32, bf16]}")
    assert "2 different bases" in " ".join(plan.notes)
    assert plan.seconds == pytest.approx(planned().seconds + START_S)
    plan = planned(space="adapter: {choice: [{type: lora, r: 4}, {type: ia3}]}")
    assert not any("bases" in note for note in plan.notes)
    plan = planned(space="adapter: {choice: [{type: lora, r: 4}, {type: xlora, adapters: {a: /a}}]}")
    assert "2 different bases" in " ".join(plan.notes)  # one of them keeps no cache


def test_a_whole_section_and_a_part_of_it_are_not_both_drawn():
    with pytest.raises(SpecError, match=r"adapter.r is a part of adapter"):
        planned(space="adapter: {choice: [{type: lora, r: 4}]}, adapter.r: {choice: [8]}")


def test_what_is_wrong_within_a_whole_section_is_named():
    with pytest.raises(SpecError, match=r"sweep.space.adapter: adapter.rnk: lora has no such field"):
        planned(space="adapter: {choice: [{type: ia3}, {type: lora, rnk: 4}]}")


def test_a_trial_that_the_base_refuses_is_named():
    with pytest.raises(SpecError, match=r"the trial with .*'k_prj' matched none") as refused:
        planned(space="adapter.target_modules: {choice: [[q_proj], [k_prj]]}")
    assert refused.value.where == "sweep.space.adapter.target_modules"


def test_on_a_gpu_a_prefix_has_a_base_that_recomputes_nothing():
    """`gradient_checkpointing: auto` is on there, but for what needs the base's cache."""
    lora, prefix = (
        load_job_text(
            f"name: x\nmodel: {{base_model: b}}\ndata: {{datasets: [{{path: a.jsonl}}]}}\n{text}"
        ).spec
        for text in ("", "adapter: {type: prefix_tuning, num_virtual_tokens: 4}")
    )
    assert base_key(lora) == base_key(prefix)
    assert base_key(lora, on_gpu=True) != base_key(prefix, on_gpu=True)
    with pytest.raises(
        SpecError, match=r"training.gradient_checkpointing: true: prefix_tuning keeps its tokens"
    ):
        load_job_text(
            "name: x\nmodel: {base_model: b}\ndata: {datasets: [{path: a.jsonl}]}\n"
            "adapter: {type: prefix_tuning, num_virtual_tokens: 4}\ntraining: {gradient_checkpointing: true}"
        )


@pytest.mark.parametrize("budget", ["time: 1s", "worker_hours: 0.001"])
def test_a_budget_that_is_too_small_for_all_trials_is_said(budget):
    text = JOB.format(training="", pack="auto", space=SEEDS).replace(
        "  pack", f"  budget: {{{budget}}}\n  pack"
    )
    spec = load_job_text(text, "jobs/x.yaml").spec
    plan = make_sweep_plan(spec, None, sizes_of(CONFIG, TENSORS))
    assert any(note.startswith(f"sweep.budget.{budget.split(':')[0]}") for note in plan.notes)
    assert not any("budget" in note for note in planned().notes)
    roomy = load_job_text(text.replace("1s", "2h").replace("0.001", "9"), "jobs/x.yaml").spec
    assert not any("budget" in note for note in make_sweep_plan(roomy, None, sizes_of(CONFIG, TENSORS)).notes)


def test_an_elastic_job_has_groups_of_a_fixed_size():
    spec = load_job_text(JOB.format(training="", pack="auto", space=SEEDS), "jobs/x.yaml").spec
    elastic = spec.model_copy(update={"resources": spec.resources.model_copy(update={"num_workers": (1, 4)})})
    cluster = ClusterFacts((NodeFacts(2, 0, 2**34),), 2, 0)
    plan = make_sweep_plan(elastic, cluster, sizes_of(CONFIG, TENSORS))
    assert plan.trial.num_workers == 2 and plan.layout.groups == 1 and plan.trial.sizes == ()
    made = trial_plan(plan.trial, trial_job(elastic, {"training.seed": 1}))
    assert (made.num_workers, made.global_batch_size, made.gradient_accumulation_steps) == (2, 4, 2)


def test_a_trial_has_the_zero_stage_that_it_asks_for():
    spec = load_job_text(
        JOB.format(training="", pack="auto", space="deepspeed: {choice: [zero0, zero3]}"), "jobs/x.yaml"
    ).spec
    plan = make_sweep_plan(spec, None, sizes_of(CONFIG, TENSORS)).trial
    jobs = [trial_job(spec, {"deepspeed": stage}) for stage in ("zero0", "zero3")]
    made = [trial_plan(plan, job) for job in jobs]
    assert [each.zero_stage for each in made] == [0, 3]
    assert [each.deepspeed["zero_optimization"]["stage"] for each in made] == [0, 3]
    assert base_key(jobs[0]) != base_key(jobs[1])
