from tests.contract.case import LINEAR, Case, Field, Parity, tensors_of

CASES = (
    Case("BONE", "plain", {"r": 4}, LINEAR),
    Case("BONE", "r that leaves a rest", {"r": 5, "bias": "bone_only"}, ("linear", "Conv1D")),
    Case("BONE", "bat", {"r": 4, "init_weights": "bat"}, ("linear", "linear without bias")),
    Case("BONE", "random start", {"r": 4, "init_weights": False}, ("linear",), is_fresh=False),
)

# HF PEFT has it no longer: tests/peft_dist/test_bone.py compares it with its MiSS.
PARITY = {}

_BONE = {"task_type": "CAUSAL_LM", "r": 8}
MODELS = {
    "bone": Parity("llama", "BoneConfig", _BONE),
    "bone bat": Parity(
        "llama", "BoneConfig", {**_BONE, "init_weights": "bat", "target_modules": ["q_proj", "up_proj"]}
    ),
}


def _r() -> None:
    few, more = (tensors_of("BONE", r=value, target_modules=["q_proj", "v_proj"]) for value in (4, 8))
    assert few.keys() == more.keys() and few != more


FIELD_BASE = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
FIELDS = {
    "r": (_r, Field(0, "error"), Field(17, "error"), Field(5, "error", {"init_weights": "bat"})),
    "init_weights": (Field(False, "start"), Field("bat", "tensors"), Field("mini", "error")),
    "layers_pattern": Field("layers", "error", {"target_modules": "q_proj"}),
}
