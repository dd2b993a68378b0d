from tests.contract.case import CONVS, GROUPED, LINEAR, Case, Field, Parity, tensors_of

CASES = (
    Case("BOFT", "plain", {"boft_block_size": 4}, (*LINEAR, *CONVS)),
    Case(
        "BOFT",
        "blocks",
        {"boft_block_size": 0, "boft_block_num": 3, "bias": "boft_only"},
        ("linear", "Conv1D"),
    ),
    Case("BOFT", "small blocks", {"boft_block_size": 2}, GROUPED),
    Case("BOFT", "two factors", {"boft_block_size": 2, "boft_n_butterfly_factor": 2}, (*LINEAR, "conv2d")),
    Case(
        "BOFT",
        "three factors",
        {"boft_block_size": 6, "boft_n_butterfly_factor": 3},
        ("conv2d",),
    ),
    Case("BOFT", "random start", {"boft_block_size": 4, "init_weights": False}, ("linear",), is_fresh=False),
)

_BOFT = {"task_type": "CAUSAL_LM", "boft_block_size": 8}
PARITY = {
    "boft": Parity("llama", "BOFTConfig", _BOFT),
    "boft by blocks": Parity(
        "llama",
        "BOFTConfig",
        {
            **_BOFT,
            "boft_block_size": 0,
            "boft_block_num": 4,
            "bias": "boft_only",
            "target_modules": ["q_proj", "up_proj", "down_proj"],
        },
    ),
}


def _boft_block_num() -> None:
    given = {"target_modules": ["q_proj", "v_proj"], "boft_block_size": 0}
    few, more = (tensors_of("BOFT", boft_block_num=value, **given) for value in (2, 4))
    assert few.keys() == more.keys() and few != more


FIELD_BASE = {"boft_block_size": 4, "target_modules": ["q_proj", "v_proj"]}
FIELDS = {
    "boft_block_size": (Field(8, "tensors"), Field(3, "error"), Field(0, "error")),
    "boft_block_num": (_boft_block_num, Field(4, "error")),
    "boft_n_butterfly_factor": (Field(2, "tensors"), Field(0, "error"), Field(4, "error")),
    "boft_dropout": (Field(0.5, "training"), Field(1.0, "error")),
    "init_weights": (Field(False, "start"), Field("zero", "error")),
}
