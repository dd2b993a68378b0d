from __future__ import annotations

import warnings

import pytest
import torch

import peft_dist
from tests.contract import bases
from tests.contract.case import LINEAR, Case, Field, Parity

_STEPS = {"init_r": 4, "target_r": 2, "total_step": 10}
CASES = (
    Case("ADALORA", "plain", {**_STEPS, "lora_alpha": 6}, (*LINEAR, "conv2d", "conv2d with groups")),
    Case("ADALORA", "random start", {**_STEPS, "init_lora_weights": False}, ("linear",), is_fresh=False),
    Case("ADALORA", "bias", {**_STEPS, "bias": "lora_only"}, ("linear",)),
    Case(
        "ADALORA",
        "allotted ranks",
        {**_STEPS, "rank_pattern": {"target.lora_E": [True, False, True, False]}},
        ("linear", "conv2d"),
    ),
)

_CAUSAL = {**_STEPS, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
PARITY = {
    "adalora": Parity("llama", "AdaLoraConfig", _CAUSAL),
    "adalora on Conv1D": Parity("gpt2", "AdaLoraConfig", {**_CAUSAL, "fan_in_fan_out": True}),
    "adalora classifier": Parity(
        "classifier",
        "AdaLoraConfig",
        {**_STEPS, "task_type": "SEQ_CLS", "target_modules": ["q_proj", "down_proj"]},
    ),
}


def _allotted(**values):
    """What a short training leaves of the ranks, and how important the triplets were before."""
    torch.manual_seed(0)
    steps = {"init_r": 4, "target_r": 2, "total_step": 8, "tfinal": 2}
    config = peft_dist.AdaLoraConfig(
        **{**steps, **values}, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = peft_dist.get_peft_model(bases.llama(), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    seen = []
    for step in range(8):
        ids = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        budget = model.base_model.controllers["default"]
        scores = [t.sum().item() for t in (*budget.sensitivity.values(), *budget.uncertainty.values())]
        seen.append((config.rank_pattern, scores))
    return seen


def _schedule(field: str, value, **more):
    def changes() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert _allotted(**more) == _allotted(**more)
            assert _allotted(**more) != _allotted(**more, **{field: value})

    return changes


def _r() -> None:
    with pytest.warns(UserWarning, match="AdaLoraConfig.r is not used"):
        peft_dist.AdaLoraConfig(r=4, total_step=10)


FIELD_BASE = {**_STEPS, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
FIELDS = {
    "r": _r,
    "lora_alpha": Field(5, "output"),
    "lora_dropout": Field(0.5, "training"),
    "use_rslora": Field(True, "error"),
    "init_lora_weights": (Field(False, "start"), Field("pissa", "error")),
    "bias": (Field("all", "trained"), Field("lora_only", "trained"), Field("some", "error")),
    "rank_pattern": Field({"model.layers.0.self_attn.q_proj.lora_E": [True, False, True, False]}, "tensors"),
    "alpha_pattern": Field({"q_proj": 3}, "error"),
    "megatron_config": Field({"a": 1}, "error"),
    "megatron_core": Field("other.core", "error"),
    "trainable_token_indices": Field([1, 2], "tensors"),
    "loftq_config": Field({"loftq_bits": 4}, "error", {"init_lora_weights": "loftq"}),
    "eva_config": Field({"rho": 2.0}, "error"),
    "corda_config": Field({"corda_method": "kpm"}, "error"),
    "lora_ga_config": Field({}, "error"),
    "use_dora": Field(True, "error"),
    "velora_config": Field({}, "error"),
    "alora_invocation_tokens": Field([1], "error"),
    "use_qalora": Field(True, "error"),
    "qalora_group_size": Field(8, "error"),
    "monteclora_config": Field({}, "error"),
    "layer_replication": Field([[0, 2], [0, 1]], "tensors"),
    "runtime_config": Field({"ephemeral_gpu_offload": True}, "error"),
    "lora_bias": Field(True, "error"),
    "target_parameters": Field(["a"], "error"),
    "use_bdlora": Field({}, "error"),
    "arrow_config": Field({}, "error"),
    "kasa_config": Field({}, "error"),
    "ensure_weight_tying": Field(True, "output", {"modules_to_save": ["embed_tokens"]}, "tied_llama"),
    "target_r": _schedule("target_r", 1),
    "init_r": (Field(3, "tensors"), Field(0, "error")),
    "tinit": _schedule("tinit", 3),
    "tfinal": _schedule("tfinal", 4),
    "deltaT": (_schedule("deltaT", 3), Field(0, "error")),
    "beta1": (_schedule("beta1", 0.3), Field(1.0, "error")),
    "beta2": (_schedule("beta2", 0.3), Field(0.0, "error")),
    "orth_reg_weight": (Field(0.1, "loss"), Field(-1.0, "error")),
    "total_step": (_schedule("total_step", 7), Field(0, "error")),
}
