"""What the plan counts of every method is what it then trains, to the last number."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import peft_dist
from orchestrator.errors import SpecError
from orchestrator.plan import make_plan
from orchestrator.plan.adapter_sizes import adapter_sizes
from orchestrator.plan.model_sizes import ModelSizes, read_sizes
from orchestrator.plan.row_lengths import RowFacts
from orchestrator.spec import adapter as adapters
from orchestrator.spec.adapter import method_names, peft_config
from orchestrator.spec.job import AdapterSpec
from peft_dist.catalog import METHODS, config_class
from peft_dist.loading import load_base

from .spec.jobs import NEEDED, spec_of
from .test_plan import ONE, llama

ASSETS = Path(__file__).parents[2] / "jobs" / "assets"
JOINS = {"xlora": "it joins adapters that are there already"}
CASES = [
    (kind, task)
    for kind in method_names()
    if kind not in JOINS
    for task in METHODS[kind.upper()].task_types
    if (kind, task) != ("adaption_prompt", "SEQ_2_SEQ_LM")  # its blocks are those of three decoders
]


@pytest.fixture(scope="module")
def sizes() -> dict[str, ModelSizes]:
    return {name: read_sizes(str(ASSETS / name)) for name in ("tiny-llama", "tiny-t5")}


def trained(base: str, spec: AdapterSpec, task: str) -> tuple[int, int]:
    """(elements that require a gradient, those of the largest tensor) once the adapter is on the base."""
    labels = ["a", "b", "c"] if task in ("SEQ_CLS", "TOKEN_CLS") else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_class(spec.type.upper())(**peft_config(spec, task))
        model = peft_dist.get_peft_model(load_base(str(ASSETS / base), task=task, labels=labels), config)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    return sum(sizes), max(sizes)


@pytest.mark.parametrize(("kind", "task"), CASES, ids=lambda value: value)
def test_every_method_on_every_task(kind, task, sizes):
    base = "tiny-t5" if task == "SEQ_2_SEQ_LM" else "tiny-llama"
    spec = AdapterSpec(type=kind, **NEEDED.get(kind, {}))
    planned = adapter_sizes(spec, sizes[base], task, 3)
    assert planned is not None
    assert (planned.parameters, planned.largest) == trained(base, spec, task)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [1, 2, 3]},
        {"trainable_token_indices": {"embed_tokens": [4]}, "target_modules": ["q_proj"]},
        {"rank_pattern": {"q_proj": 2}},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_variants_of_lora(fields, sizes):
    spec = AdapterSpec(type="lora", r=4, **fields)
    planned = adapter_sizes(spec, sizes["tiny-llama"])
    assert planned is not None and planned.parameters == trained("tiny-llama", spec, "CAUSAL_LM")[0]


def test_numbers_that_layers_share_by_their_sizes(sizes):
    spec = AdapterSpec(
        type="waveft", n_frequency=50, proportional_parameters=True, target_modules=["q_proj", "down_proj"]
    )
    planned = adapter_sizes(spec, sizes["tiny-llama"])
    assert planned is not None
    assert (planned.parameters, planned.largest) == trained("tiny-llama", spec, "CAUSAL_LM")
    assert planned.largest > 50


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("p_tuning", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 16}),
        ("p_tuning", {"encoder_hidden_size": 16}),
        ("prefix_tuning", {"prefix_projection": True, "encoder_hidden_size": 16}),
        ("multitask_prompt_tuning", {"num_tasks": 3}),
    ],
)
def test_heads_of_prompt_methods(kind, fields, sizes):
    spec = AdapterSpec(type=kind, num_virtual_tokens=5, **fields)
    planned = adapter_sizes(spec, sizes["tiny-llama"])
    assert planned is not None and planned.virtual_tokens == 5
    assert planned.parameters == trained("tiny-llama", spec, "CAUSAL_LM")[0]


def test_what_stays_frozen_is_kept_without_gradients_or_states():
    plan = make_plan(spec_of("adapter: {type: vera, r: 16}\ndeepspeed: zero0\n"), ONE, llama())
    memory, own = plan.memory, 4 * plan.adapter_parameters
    assert memory.adapter > own == memory.gradients and memory.optimizer == 2 * own


def test_a_task_s_head_is_counted_and_the_language_model_s_is_not():
    job = {
        "name": "x", "model": {"base_model": "b"}, "data": {"datasets": [{"path": "a", "type": "classification"}]},
    }  # fmt: skip
    from_labels = adapters_plan(job, RowFacts(labels=5))
    unknown = adapters_plan(job, RowFacts())
    assert from_labels.adapter_parameters == unknown.adapter_parameters + 5 * 64
    assert "How many labels the rows have is not known: the head on top is not counted." in unknown.notes
    language = make_plan(spec_of(), ONE, llama())
    assert from_labels.base_parameters == language.base_parameters - 1000 * 64 + 5 * 64
    assert from_labels.memory.activations < language.memory.activations


def adapters_plan(job, rows):
    from orchestrator.spec.load import load_job_mapping

    return make_plan(load_job_mapping(job).spec, ONE, llama(), rows)


def test_a_layer_of_another_kind_is_refused_before_the_base_is_read():
    spec = AdapterSpec(type="c3a", block_size=4, target_modules=["embed_tokens"])
    with pytest.raises(
        SpecError, match=r"^adapter.target_modules: 'model.embed_tokens' is a layer of kind embedding; C3A"
    ):
        adapter_sizes(spec, llama())


def test_a_size_that_does_not_divide_is_found_by_the_plan():
    with pytest.raises(
        SpecError, match=r"^adapter.target_modules: .*block_size: 256 does not divide in = 64 of"
    ):
        make_plan(spec_of("adapter: {type: c3a}\n"), ONE, llama())


def test_a_method_that_is_no_list_of_tensors_is_said(monkeypatch):
    from orchestrator import plan as plans

    monkeypatch.setattr(plans, "adapter_sizes", lambda *given: None)
    made = make_plan(spec_of(), ONE, llama())
    assert made.memory is None and made.adapter_parameters is None
    assert "Memory is not estimated: the tensors of lora are not known here." in made.notes
    assert adapters.method_names()
