from tests.contract.case import Case, Parity

_ADAPTER = {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM"}
CASES = (Case("ADAPTION_PROMPT", "two layers", _ADAPTER, ()),)
PARITY = {
    "adaption prompt": Parity("llama", "AdaptionPromptConfig", _ADAPTER),
    "adaption prompt on the last": Parity("llama", "AdaptionPromptConfig", {**_ADAPTER, "adapter_layers": 1}),
    "adaption prompt on Mistral": Parity("mistral", "AdaptionPromptConfig", _ADAPTER),
    "adaption prompt on GPT-2": Parity("gpt2", "AdaptionPromptConfig", _ADAPTER),
}
