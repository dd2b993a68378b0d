from tests.contract.case import CONVS, GROUPED, LINEAR, Case, Field, Parity

CASES = (
    Case("HRA", "plain", {"r": 4}, (*LINEAR, *CONVS, *GROUPED)),
    Case("HRA", "odd", {"r": 3, "bias": "hra_only"}, ("linear", "Conv1D", "conv2d"), is_fresh=False),
    Case("HRA", "orthogonal", {"r": 4, "apply_GS": True}, ("linear", "conv2d"), is_fresh=False),
    Case("HRA", "random start", {"r": 4, "init_weights": False}, ("linear",), is_fresh=False),
)

_HRA = {"task_type": "CAUSAL_LM", "r": 4}
PARITY = {
    "hra": Parity("llama", "HRAConfig", _HRA),
    "hra of an odd rank": Parity(
        "llama",
        "HRAConfig",
        {**_HRA, "r": 5, "bias": "hra_only", "target_modules": ["q_proj", "up_proj", "down_proj"]},
    ),
    "hra of orthogonal directions": Parity(
        "llama", "HRAConfig", {**_HRA, "apply_GS": True, "init_weights": False}
    ),
}

FIELD_BASE = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
FIELDS = {
    "r": (Field(6, "tensors"), Field(0, "error"), Field(17, "error")),
    "apply_GS": Field(True, "output", {"init_weights": False}),
    "init_weights": Field(False, "start"),
}
