"""Every method of the catalog as `adapter.type` of a job: it trains, and a run that stopped goes on to the same."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

import peft_dist
from orchestrator.spec.adapter import method_names
from orchestrator.train.tasks.causal import CausalLM
from orchestrator.train.worker.data import load_examples
from orchestrator.train.worker.run import train
from peft_dist.catalog import METHODS, config_class
from peft_dist.loading import load_base

from ..spec.jobs import NEEDED
from .ends import adapter_of
from .test_run import Recorder
from .tiny import job, plan, request

pytestmark = pytest.mark.usefixtures("one_thread")


# Sizes that fit a base of 2 layers x 32, whose keys and values are 16 wide.
SMALL: dict[str, dict] = {
    **NEEDED,
    **{
        name: {"r": 4}
        for name in ("lora", "loha", "lokr", "miss", "bone", "hra", "randlora", "delora", "shira")
    },
    "adalora": {"init_r": 4, "target_r": 2},
    "vera": {"r": 8},
    "gralora": {"r": 4, "gralora_k": 2},
    "poly": {"r": 2, "n_skills": 2},
    "oft": {"oft_block_size": 4},
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 20},
    "waveft": {"n_frequency": 20},
    "road": {"group_size": 8},
    "vblora": {"num_vectors": 16, "vector_length": 8, "topk": 2},
    "ln_tuning": {"target_modules": ["input_layernorm", "norm"]},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
}
OWN_ROWS = {"xlora": "it joins adapters that are there already"}


METHOD_NAMES = [
    name
    for name in method_names()
    if name not in OWN_ROWS and "CAUSAL_LM" in METHODS[name.upper()].task_types
]


@pytest.mark.parametrize("kind", METHOD_NAMES)
def test_it_trains_and_a_stopped_run_goes_on_to_the_same(kind, tmp_path):
    spec = job(
        tmp_path,
        rows=9,
        adapter={"type": kind, **SMALL.get(kind, {})},
        training={"num_epochs": 2, "save_steps": 1},
    )
    told = Recorder()
    whole = train(request(tmp_path, spec, plan(micro=2), run="whole"), reporter=told)
    assert whole.steps == 4 and whole.metrics["eval_loss"] != whole.metrics["base.eval_loss"]
    assert all(event["grad_norm"] > 0 for event in told.of("progress")[1:])
    first = train(request(tmp_path, spec, plan(micro=2), run="parts"), reporter=Recorder(stop_after=2))
    assert first.is_stopped and first.steps == 2
    second = train(request(tmp_path, spec, plan(micro=2), run="parts"))
    one, two = adapter_of(whole), adapter_of(second)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {k: v for k, v in second.metrics.items() if k != "train_loss"} == {
        k: v for k, v in whole.metrics.items() if k != "train_loss"
    }


def test_a_mixture_of_adapters_that_are_there(tmp_path):
    one = train(request(tmp_path, job(tmp_path, adapter={"r": 2}), run="one"))
    two = train(request(tmp_path, job(tmp_path, adapter={"r": 2}, training={"seed": 1}), run="two"))
    mixed = {"type": "xlora", "adapters": {"a": one.adapter_dir, "b": two.adapter_dir}, "xlora_size": 8}
    spec = job(
        tmp_path,
        adapter=mixed,
        training={"save_steps": 1},
        eval={"metrics": ["contains"], "max_new_tokens": 3},
    )
    whole = train(request(tmp_path, spec, plan(micro=2), run="whole"))
    assert whole.metrics["eval_loss"] != whole.metrics["base.eval_loss"]
    first = train(request(tmp_path, spec, plan(micro=2), run="parts"), reporter=Recorder(stop_after=3))
    second = train(request(tmp_path, spec, plan(micro=2), run="parts"))
    assert first.is_stopped and second.metrics["eval_loss"] == whole.metrics["eval_loss"]


def test_a_context_is_trained_on_its_own_answers_too(tmp_path):
    """CPT's loss over a batch is its model's own, whose mean counts the context's answers (arXiv:2410.17222)."""
    own = {"cpt_token_ids": [70, 71, 72, 73], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]}
    fields = {**own, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.9}
    spec = job(tmp_path, adapter={"type": "cpt", **fields})
    tokenizer = AutoTokenizer.from_pretrained(spec.model.base_model)
    rows = load_examples(spec, tokenizer, max_len=100).train[:3]
    config = config_class("CPT")(**fields, task_type="CAUSAL_LM")
    model = peft_dist.get_peft_model(load_base(spec.model.base_model), config)
    batch = CausalLM(tokenizer, method=config).collate(rows, range(3))
    plain = CausalLM(tokenizer).collate(rows, range(3))
    assert batch.targets == plain.targets + 3
    ours = CausalLM(tokenizer, method=config).loss(model, batch) / batch.targets
    theirs = model(**plain.inputs, labels=plain.labels["labels"]).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}, {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"}, {"init_lora_weights": "mica"}, {"init_lora_weights": "eva"},
        {"init_lora_weights": "corda"}, {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        {"trainable_token_indices": [70, 71]}, {"modules_to_save": ["embed_tokens"]}, {"rank_pattern": {"q_proj": 2}},
        {"layer_replication": [[0, 2], [1, 2]]},
    ],
    ids=str,
)  # fmt: skip
def test_variants_of_lora_train_and_go_on(fields, tmp_path):
    spec = job(
        tmp_path,
        rows=9,
        adapter={"type": "lora", "r": 4, **fields},
        training={"num_epochs": 2, "save_steps": 1},
    )
    whole = train(request(tmp_path, spec, plan(micro=2), run="whole"))
    assert whole.steps == 4 and whole.metrics["eval_loss"] != whole.metrics["base.eval_loss"]
    train(request(tmp_path, spec, plan(micro=2), run="parts"), reporter=Recorder(stop_after=2))
    second = train(request(tmp_path, spec, plan(micro=2), run="parts"))
    assert second.metrics["eval_loss"] == whole.metrics["eval_loss"]
