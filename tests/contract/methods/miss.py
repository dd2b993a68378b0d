from tests.contract.case import LINEAR, Case, Field, Parity, tensors_of

CASES = (
    Case("MISS", "plain", {"r": 4}, LINEAR),
    Case("MISS", "r that leaves a rest", {"r": 5, "bias": "MiSS_only"}, ("linear", "Conv1D")),
    Case("MISS", "mini", {"r": 3, "init_weights": "mini", "mini_r": 2}, LINEAR),
    Case("MISS", "bat", {"r": 4, "init_weights": "bat"}, ("linear", "linear without bias")),
    Case("MISS", "random start", {"r": 4, "init_weights": False}, ("linear",), is_fresh=False),
)

_MISS = {"task_type": "CAUSAL_LM", "r": 8}
PARITY = {
    "miss": Parity("llama", "MissConfig", _MISS),
    "miss with a rest": Parity(
        "llama",
        "MissConfig",
        {**_MISS, "r": 5, "bias": "MiSS_only", "target_modules": ["q_proj", "down_proj"]},
    ),
    "miss mini": Parity("llama", "MissConfig", {**_MISS, "init_weights": "mini", "mini_r": 4}),
    "miss bat": Parity(
        "llama", "MissConfig", {**_MISS, "init_weights": "bat", "target_modules": ["q_proj", "up_proj"]}
    ),
}


def _r() -> None:
    given = {"target_modules": ["q_proj", "v_proj"]}
    few, more = (tensors_of("MISS", r=value, **given) for value in (4, 8))
    assert few.keys() == more.keys() and few != more


FIELD_BASE = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
FIELDS = {
    "r": (
        _r,
        Field(0, "error"),
        Field(17, "error"),
        Field(5, "error", {"init_weights": "bat"}),
    ),
    "miss_dropout": (Field(0.5, "training"), Field(1.0, "error")),
    "mini_r": (
        Field(2, "tensors", {"init_weights": "mini"}),
        Field(5, "error", {"init_weights": "mini"}),
        Field(0, "error"),
    ),
    "init_weights": (
        Field(False, "start"),
        Field("bat", "tensors"),
        Field("mini", "tensors"),
        Field("maxi", "error"),
    ),
    "layers_pattern": Field("layers", "error", {"target_modules": "q_proj"}),
}
