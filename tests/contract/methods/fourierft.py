from tests.contract.case import LINEAR, Case, Field, Parity

CASES = (
    Case("FOURIERFT", "plain", {"n_frequency": 20}, LINEAR, is_fresh=False),
    Case("FOURIERFT", "from zero", {"n_frequency": 96, "init_weights": True, "scaling": 30.0}, ("linear",)),
    Case(
        "FOURIERFT",
        "patterns and biases",
        {"n_frequency_pattern": {"target": 9}, "bias": "fourier_only", "random_loc_seed": 3},
        ("linear", "Conv1D"),
        is_fresh=False,
    ),
)

_FEW = {"task_type": "CAUSAL_LM", "n_frequency": 30, "scaling": 20.0}
PARITY = {
    "fourierft": Parity("llama", "FourierFTConfig", _FEW),
    "fourierft on Conv1D": Parity("gpt2", "FourierFTConfig", {**_FEW, "fan_in_fan_out": True}),
    "fourierft with patterns": Parity(
        "llama",
        "FourierFTConfig",
        {
            **_FEW,
            "n_frequency_pattern": {"v_proj": 7},
            "random_loc_seed": 5,
            "bias": "fourier_only",
            "init_weights": True,
        },
    ),
}

FIELD_BASE = {"n_frequency": 30, "target_modules": ["q_proj", "v_proj"]}
FIELDS = {
    "n_frequency": (
        Field(31, "tensors", {"target_modules": ["lm_head"]}),
        Field(0, "error"),
        Field(257, "error"),
    ),
    "scaling": Field(100.0, "output"),
    "random_loc_seed": Field(3, "output"),
    "n_frequency_pattern": Field({"v_proj": 4}, "tensors"),
    "init_weights": Field(True, "start"),
}
