from tests.contract.case import LINEAR, Case, Field, Parity, tensors_of

CASES = (
    Case("SHIRA", "plain", {"r": 2}, LINEAR),
    Case(
        "SHIRA",
        "random start",
        {"r": 1, "random_seed": 3, "init_weights": False},
        ("linear",),
        is_fresh=False,
    ),
)

_SHIRA = {"task_type": "CAUSAL_LM", "r": 3}
PARITY = {
    "shira": Parity("llama", "ShiraConfig", _SHIRA),
    "shira of a seed": Parity(
        "llama", "ShiraConfig", {**_SHIRA, "random_seed": 7, "target_modules": ["up_proj", "down_proj"]}
    ),
}


def _r() -> None:
    given = {"target_modules": ["q_proj", "v_proj"]}
    few, more = (tensors_of("SHIRA", r=value, **given) for value in (3, 4))
    assert few.keys() == more.keys() and few != more


FIELD_BASE = {"r": 3, "target_modules": ["q_proj", "v_proj"]}
FIELDS = {
    "r": (_r, Field(0, "error"), Field(9, "error")),
    "mask_type": Field("mine", "error"),
    "random_seed": Field(3, "start"),
    "init_weights": Field(False, "start"),
}
