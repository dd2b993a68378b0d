from tests.contract.case import LINEAR, Case, Field, Parity

CASES = (
    Case("POLY", "plain", {"r": 5, "n_tasks": 3}, LINEAR),
    Case("POLY", "two splits", {"r": 5, "n_tasks": 3, "n_skills": 2, "n_splits": 2}, ("linear",)),
    Case("POLY", "random start", {"r": 5, "n_tasks": 3, "init_weights": False}, ("linear",), is_fresh=False),
)

_POLY = {"r": 3, "n_tasks": 3, "task_type": "CAUSAL_LM"}
_TASKS = {"task_ids": [2, 0, 2]}
PARITY = {
    "poly": Parity("llama", "PolyConfig", _POLY, _TASKS),
    "poly with splits": Parity(
        "llama",
        "PolyConfig",
        {**_POLY, "target_modules": ["q_proj", "down_proj"], "n_splits": 2, "n_skills": 3},
        _TASKS,
    ),
    "poly with a random start": Parity("llama", "PolyConfig", {**_POLY, "init_weights": False}, _TASKS),
    "poly classifier": Parity("classifier", "PolyConfig", {**_POLY, "task_type": "SEQ_CLS"}, _TASKS),
}

FIELD_BASE = {"target_modules": ["q_proj", "v_proj"], "n_tasks": 3}
FIELDS = {
    "r": (Field(3, "tensors"), Field(0, "error")),
    "init_weights": Field(False, "start"),
    "poly_type": Field("other", "error"),
    "n_tasks": (Field(4, "tensors"), Field(0, "error")),
    "n_skills": (Field(3, "tensors"), Field(0, "error")),
    "n_splits": (Field(2, "tensors"), Field(3, "error")),
}
