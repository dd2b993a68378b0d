from tests.contract.case import Case, Parity

CASES = (Case("PROMPT_TUNING", "random", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}, ()),)

_THREE = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
PARITY = {
    "prompt": Parity("llama", "PromptTuningConfig", _THREE),
    "prompt on GPT-2": Parity("gpt2", "PromptTuningConfig", _THREE),
    "prompt classifier": Parity("classifier", "PromptTuningConfig", {**_THREE, "task_type": "SEQ_CLS"}),
}
