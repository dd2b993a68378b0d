from tests.contract.case import CONVS, GROUPED, LINEAR, Case, Field, Parity

CASES = (
    Case("IA3", "output", {"feedforward_modules": []}, (*LINEAR, *CONVS, *GROUPED)),
    Case("IA3", "input", {"feedforward_modules": ["target"]}, (*LINEAR, *CONVS, *GROUPED)),
    Case(
        "IA3",
        "random start",
        {"feedforward_modules": [], "init_ia3_weights": False},
        ("linear",),
        is_fresh=False,
    ),
)

_CAUSAL = {"task_type": "CAUSAL_LM"}
PARITY = {
    "ia3 on convolutions": Parity(
        "convs",
        "IA3Config",
        {"target_modules": ["stem", "depth", "point"], "feedforward_modules": ["depth"]},
    ),
    "ia3": Parity("llama", "IA3Config", _CAUSAL),
    "ia3 on Conv1D": Parity("gpt2", "IA3Config", {**_CAUSAL, "fan_in_fan_out": True}),
    "ia3 of names": Parity(
        "llama",
        "IA3Config",
        {**_CAUSAL, "target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
}

FIELD_BASE = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": []}
FIELDS = {
    "feedforward_modules": (Field(["down_proj"], "output"), Field(["up_proj"], "error")),
    "init_ia3_weights": Field(False, "start"),
    "target_modules": Field(["k_proj"], "tensors"),
}
