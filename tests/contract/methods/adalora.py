from tests.contract.case import LINEAR, Case, Parity

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
