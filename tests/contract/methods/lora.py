from __future__ import annotations

import warnings

import torch

import peft_dist
from peft_dist.calibration import corda, eva
from tests.contract import bases
from tests.contract.case import CONVS, GROUPED, LINEAR, Case, Field, Parity

CASES = (
    Case("LORA", "plain", {"r": 4}, (*LINEAR, "embedding", *CONVS, *GROUPED)),
    Case("LORA", "rslora", {"r": 4, "lora_alpha": 3, "use_rslora": True}, ("linear",)),
    Case("LORA", "gaussian", {"r": 4, "init_lora_weights": "gaussian"}, ("linear", "embedding")),
    Case(
        "LORA", "random start", {"r": 4, "init_lora_weights": False}, ("linear", "embedding"), is_fresh=False
    ),
    Case("LORA", "bias", {"r": 4, "bias": "lora_only"}, ("linear", "Conv1D", "conv2d")),
    Case(
        "LORA",
        "patterns",
        {"r": 4, "rank_pattern": {"target": 2}, "alpha_pattern": {"target": 5}},
        ("linear",),
    ),
    Case("LORA", "dora", {"r": 4, "use_dora": True}, (*LINEAR, "embedding", *CONVS, *GROUPED)),
    Case("LORA", "dora with biases", {"r": 4, "use_dora": True, "bias": "lora_only"}, ("linear", "conv2d")),
    Case("LORA", "lora_bias", {"r": 4, "lora_alpha": 3, "lora_bias": True}, ("linear", "Conv1D", "conv2d")),
    Case("LORA", "orthogonal", {"r": 4, "init_lora_weights": "orthogonal"}, LINEAR),
    Case("LORA", "pissa", {"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa"}, LINEAR),
    Case("LORA", "pissa of an embedding", {"r": 4, "init_lora_weights": "pissa"}, ("embedding",)),
    Case("LORA", "fast pissa", {"r": 2, "init_lora_weights": "pissa_niter_4"}, ("linear",)),
    Case("LORA", "olora", {"r": 2, "lora_alpha": 3, "init_lora_weights": "olora"}, LINEAR),
    Case("LORA", "mica", {"r": 2, "lora_alpha": 3, "init_lora_weights": "mica"}, (*LINEAR, "embedding")),
    Case("LORA", "eva", {"r": 4, "init_lora_weights": "eva"}, ("linear",)),
    Case("LORA", "dora from pissa", {"r": 4, "use_dora": True, "init_lora_weights": "pissa"}, ("linear",)),
)

_LORA = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
_Q = {**_LORA, "target_modules": ["q_proj"]}
PARITY = {
    "lora": Parity("llama", "LoraConfig", _LORA),
    "lora on all linear": Parity("llama", "LoraConfig", {**_LORA, "target_modules": "all-linear"}),
    "lora on experts": Parity(
        "mixtral",
        "LoraConfig",
        {
            **_LORA,
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {r"layers\.0\.mlp\.experts\.down_proj": 2},
        },
    ),
    "lora on experts alone": Parity(
        "qwen2_moe",
        "LoraConfig",
        {**_LORA, "target_modules": [], "target_parameters": ["experts.down_proj", "mlp.gate.weight"]},
    ),
    "lora on convolutions": Parity(
        "convs", "LoraConfig", {"r": 6, "target_modules": ["stem", "depth", "point", "wave", "narrow"]}
    ),
    "lora without a task": Parity("llama", "LoraConfig", {"r": 4, "target_modules": ["o_proj"]}),
    "lora by regex": Parity(
        "llama", "LoraConfig", {**_LORA, "target_modules": r".*layers\.1\..*(up|down)_proj"}
    ),
    "lora on an embedding": Parity(
        "llama", "LoraConfig", {**_LORA, "target_modules": ["embed_tokens", "k_proj"]}
    ),
    "rslora with patterns": Parity(
        "llama",
        "LoraConfig",
        {
            **_LORA,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"v_proj": 9},
        },
    ),
    "lora with biases of targets": Parity("llama", "LoraConfig", {**_LORA, "bias": "lora_only"}),
    "lora with all biases": Parity("llama", "LoraConfig", {**_LORA, "bias": "all"}),
    "lora in some layers": Parity(
        "llama", "LoraConfig", {**_Q, "layers_to_transform": [1], "layers_pattern": "layers"}
    ),
    "lora without some": Parity(
        "llama",
        "LoraConfig",
        {**_Q, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    ),
    "lora with a head": Parity("llama", "LoraConfig", {**_LORA, "modules_to_save": ["lm_head"]}),
    "lora on Conv1D": Parity("gpt2", "LoraConfig", {**_LORA, "fan_in_fan_out": True}),
    "lora with all biases of GPT-2": Parity(
        "gpt2", "LoraConfig", {**_LORA, "fan_in_fan_out": True, "bias": "all"}
    ),
    "lora classifier": Parity(
        "classifier", "LoraConfig", {"r": 4, "task_type": "SEQ_CLS", "target_modules": "all-linear"}
    ),
    "dora": Parity("llama", "LoraConfig", {**_LORA, "use_dora": True, "target_modules": "all-linear"}),
    "dora on an embedding": Parity(
        "llama", "LoraConfig", {**_LORA, "use_dora": True, "target_modules": ["embed_tokens", "k_proj"]}
    ),
    "dora on Conv1D": Parity("gpt2", "LoraConfig", {**_LORA, "use_dora": True, "fan_in_fan_out": True}),
    "dora classifier": Parity(
        "classifier", "LoraConfig", {"r": 4, "use_dora": True, "use_rslora": True, "task_type": "SEQ_CLS"}
    ),
    "dora on convolutions": Parity(
        "convs",
        "LoraConfig",
        {"r": 4, "use_dora": True, "target_modules": ["stem", "point", "wave", "embed", "head"]},
    ),
    "lora_bias on convolutions": Parity(
        "convs",
        "LoraConfig",
        {"r": 4, "lora_bias": True, "target_modules": ["stem", "point", "wave", "head"]},
    ),
    "dora with dropout": Parity("llama", "LoraConfig", {**_LORA, "use_dora": True, "lora_dropout": 0.3}),
    "dora with biases": Parity("llama", "LoraConfig", {**_LORA, "use_dora": True, "bias": "all"}),
    "dora with a head and tokens": Parity(
        "llama",
        "LoraConfig",
        {**_LORA, "use_dora": True, "modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]},
    ),
    "lora_bias": Parity("llama", "LoraConfig", {**_LORA, "lora_bias": True}),
    "orthogonal": Parity("llama", "LoraConfig", {**_LORA, "init_lora_weights": "orthogonal"}),
    "mica": Parity("llama", "LoraConfig", {**_LORA, "init_lora_weights": "mica"}),
    "mica of an embedding": Parity(
        "llama", "LoraConfig", {**_LORA, "init_lora_weights": "mica", "target_modules": ["embed_tokens"]}
    ),
    "gaussian": Parity("llama", "LoraConfig", {**_LORA, "init_lora_weights": "gaussian"}),
    "tokens beside lora": Parity("llama", "LoraConfig", {**_LORA, "trainable_token_indices": [3, 5, 40]}),
    "tokens of a tied embedding": Parity(
        "tied_llama", "LoraConfig", {**_LORA, "trainable_token_indices": {"embed_tokens": [3, 5, 40]}}
    ),
    "a tied embedding trained whole": Parity(
        "tied_llama",
        "LoraConfig",
        {**_LORA, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


def _started(**values) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = peft_dist.LoraConfig(r=4, target_modules=["q_proj"], **values)
        model = peft_dist.get_peft_model(bases.llama(), config)
    return torch.cat([t.flatten() for t in model.adapter_tensors().values()])


def _loftq_config() -> None:
    bits = [
        _started(init_lora_weights="loftq", loftq_config={"loftq_bits": n, "loftq_iter": 1}) for n in (4, 8)
    ]
    assert not torch.allclose(*bits)


def _eva_config() -> None:
    ids = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for settings in ({}, {"whiten": True}):
        config = peft_dist.LoraConfig(
            r=2,
            target_modules=["q_proj"],
            init_lora_weights="eva",
            eva_config=peft_dist.EvaConfig(rho=1.0, tau=0.5, **settings),
        )
        state = eva.get_eva_state_dict(bases.llama(), [{"input_ids": ids}], config, show_progress_bar=False)
        found.append(torch.cat(list(state.values())))
    assert not torch.allclose(*found)


def _corda_config() -> None:
    ids = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for method in ("ipm", "kpm"):
        base = bases.llama()
        config = peft_dist.LoraConfig(
            r=2,
            target_modules=["q_proj"],
            init_lora_weights="corda",
            corda_config=peft_dist.CordaConfig(corda_method=method),
        )
        corda.preprocess_corda(base, config, run_model=lambda base=base: base(input_ids=ids))
        tensors = peft_dist.get_peft_model(base, config).adapter_tensors()
        found.append(torch.cat([t.flatten() for t in tensors.values()]))
    assert not torch.allclose(*found)


FIELDS = {
    "r": Field(3, "tensors"),
    "lora_alpha": Field(5, "output"),
    "lora_dropout": (Field(0.5, "training"), Field(1.0, "error")),
    "use_rslora": Field(True, "output"),
    "init_lora_weights": (
        *(
            Field(start, "start")
            for start in (False, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora", "mica")
        ),
        Field("nonsense", "error"),
    ),
    "rank_pattern": (Field({"q_proj": 2}, "tensors"), Field({"q_proj": 0}, "error")),
    "alpha_pattern": Field({"q_proj": 2}, "output"),
    "megatron_config": Field({"tensor_model_parallel_size": 2}, "error"),
    "megatron_core": Field("other.core", "error"),
    "trainable_token_indices": (Field([1, 2], "tensors"), Field([1, 1], "error")),
    "loftq_config": _loftq_config,
    "eva_config": (_eva_config, Field(3, "error", {"init_lora_weights": "eva"})),
    "corda_config": (_corda_config, Field(3, "error", {"init_lora_weights": "corda"})),
    "lora_ga_config": Field({}, "error"),
    "use_dora": Field(True, "tensors"),
    "velora_config": Field({"num_groups": 4}, "error"),
    "alora_invocation_tokens": Field([1], "error"),
    "use_qalora": Field(True, "error"),
    "qalora_group_size": Field(8, "error"),
    "monteclora_config": Field({}, "error"),
    "layer_replication": (Field([[0, 2], [0, 1]], "tensors"), Field([[0, 9]], "error")),
    "runtime_config": Field({"ephemeral_gpu_offload": True}, "error", {"use_dora": True})
    if not torch.cuda.is_available()
    else (),
    "lora_bias": Field(True, "tensors"),
    "target_parameters": (
        Field(["experts.gate_up_proj"], "tensors", base="mixtral"),
        Field("experts", "error"),
    ),
    "use_bdlora": Field({"nblocks": 2}, "error"),
    "arrow_config": Field({}, "error"),
    "kasa_config": Field({}, "error"),
    "ensure_weight_tying": (
        Field(True, "output", {"target_modules": ["embed_tokens"]}, "tied_llama"),
        Field(True, "error", {"use_dora": True}),
    ),
}
