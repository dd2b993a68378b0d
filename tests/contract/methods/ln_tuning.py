from tests.contract.case import Case, Field, Parity

CASES = (Case("LN_TUNING", "norms", {}, ()),)

_CAUSAL = {"task_type": "CAUSAL_LM"}
PARITY = {
    "ln tuning": Parity("llama", "LNTuningConfig", _CAUSAL),
    "ln tuning of GPT-2": Parity("gpt2", "LNTuningConfig", _CAUSAL),
    "ln tuning of any module": Parity(
        "llama", "LNTuningConfig", {**_CAUSAL, "target_modules": ["q_proj", "input_layernorm"]}
    ),
}

FIELD_BASE = {"target_modules": ["input_layernorm", "norm"]}
FIELDS = {"exclude_modules": Field(["layers.0.input_layernorm"], "tensors")}
