from tests.contract.case import LINEAR, Case, Field, Parity

CASES = (
    Case("DELORA", "plain", {"r": 3}, LINEAR),
    Case("DELORA", "bias", {"r": 3, "bias": "delora_only"}, ("linear", "Conv1D")),
    Case("DELORA", "random start", {"r": 3, "init_weights": False}, ("linear",), is_fresh=False),
    Case("DELORA", "patterns", {"rank_pattern": {"target": 2}, "lambda_pattern": {"target": 5}}, ("linear",)),
)

_DE = {"r": 3, "delora_lambda": 2, "task_type": "CAUSAL_LM"}
PARITY = {
    "delora": Parity("llama", "DeloraConfig", _DE),
    "delora on all linear": Parity(
        "llama", "DeloraConfig", {**_DE, "target_modules": "all-linear", "delora_lambda": 1}
    ),
    "delora with patterns": Parity(
        "llama",
        "DeloraConfig",
        {
            **_DE,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2},
            "lambda_pattern": {"down_proj": 3},
        },
    ),
    "delora with biases of targets": Parity("llama", "DeloraConfig", {**_DE, "bias": "delora_only"}),
    "delora with all biases": Parity("llama", "DeloraConfig", {**_DE, "bias": "all"}),
    "delora with a random start": Parity("llama", "DeloraConfig", {**_DE, "r": 5, "init_weights": False}),
}

FIELDS = {
    "r": (Field(3, "tensors"), Field(0, "error")),
    "delora_lambda": Field(4, "start"),
    "module_dropout": (Field(0.5, "training"), Field(1.0, "error")),
    "init_weights": Field(False, "start"),
    "rank_pattern": (Field({"q_proj": 3}, "tensors"), Field({"q_proj": 0}, "error")),
    "lambda_pattern": Field({"q_proj": 3}, "start"),
}
