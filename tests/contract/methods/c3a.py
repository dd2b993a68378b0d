from tests.contract.case import LINEAR, Case, Field, Parity, tensors_of

CASES = (
    Case("C3A", "plain", {"block_size": 4}, LINEAR, is_fresh=False),
    Case("C3A", "from zero", {"block_size": 2, "init_weights": True}, ("linear",)),
    Case(
        "C3A",
        "patterns and biases",
        {"block_size_pattern": {"target": 2}, "bias": "c3a_only", "init_weights": "gaussian"},
        ("linear", "Conv1D"),
        is_fresh=False,
    ),
    Case("C3A", "kaiming", {"block_size": 4, "init_weights": "kaiming_uniform"}, ("linear",), is_fresh=False),
)

_C3A = {"task_type": "CAUSAL_LM", "block_size": 8}
PARITY = {
    # The gradient that HF PEFT passes on to what is below a layer is wrong: these have nothing below.
    "c3a": Parity("llama", "C3AConfig", {**_C3A, "layers_to_transform": [1]}),
    "c3a with patterns": Parity(
        "llama",
        "C3AConfig",
        {
            **_C3A,
            "target_modules": ["down_proj"],
            "layers_to_transform": 1,
            "block_size_pattern": {"down_proj": 4},
            "init_weights": True,
        },
    ),
    "c3a in every layer": Parity(
        "llama",
        "C3AConfig",
        {
            **_C3A,
            "target_modules": ["q_proj", "up_proj", "down_proj"],
            "block_size_pattern": {"q_proj": 16, "down_proj": 1},
            "bias": "c3a_only",
        },
        wrong_gradients=("c3a_kernel", "bias"),
    ),
}


def _block_size() -> None:
    given = {"target_modules": ["q_proj", "v_proj"]}
    few, more = (tensors_of("C3A", block_size=value, **given) for value in (8, 4))
    assert few.keys() == more.keys() and few != more


FIELD_BASE = {"block_size": 8, "target_modules": ["q_proj", "v_proj"]}
FIELDS = {
    "block_size": (_block_size, Field(3, "error"), Field(0, "error")),
    "block_size_pattern": Field({"v_proj": 4}, "tensors"),
    "init_weights": (
        Field(True, "start"),
        Field("gaussian", "start"),
        Field("kaiming_uniform", "start"),
        Field("orthogonal", "error"),
    ),
    "layers_pattern": Field("layers", "error", {"target_modules": "q_proj"}),
}
