from peft_dist import OSFConfig, PeftConfig
from tests.contract.case import LINEAR, Case, Field, Parity

CASES = (
    Case("OSF", "plain", {}, LINEAR),
    Case("OSF", "rank", {"effective_rank": 6}, ("linear", "Conv1D")),
    Case(
        "OSF",
        "random start",
        {"rank_pattern": {"target": 0.7}, "init_weights": False},
        ("linear",),
        is_fresh=False,
    ),
)

_CAUSAL = {"task_type": "CAUSAL_LM"}
PARITY = {
    "osf": Parity("llama", "OSFConfig", _CAUSAL, own_tensors=("osf_start.",)),
    "osf of ranks": Parity(
        "llama",
        "OSFConfig",
        {
            **_CAUSAL,
            "effective_rank": 0.25,
            "rank_pattern": {"q_proj": 3, "down": 0.9},
            "target_modules": ["q_proj", "up_proj", "down_proj"],
        },
        own_tensors=("osf_start.",),
    ),
}


def _target_svd_config(tmp_path) -> None:
    """HF PEFT reads it nowhere; it stays in the file."""
    OSFConfig(target_svd_config={"lin0.weight": 8}).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).target_svd_config == {"lin0.weight": 8}


FIELDS = {
    "effective_rank": (
        Field(3, "tensors"),
        Field(0.25, "tensors"),
        Field(16, "error"),
        Field(0, "error"),
    ),
    "rank_pattern": Field({"v_proj": 4}, "tensors"),
    "init_weights": Field(False, "start"),
    "target_svd_config": _target_svd_config,
}
