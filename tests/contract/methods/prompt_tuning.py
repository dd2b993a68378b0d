from tests.contract.case import Case, Parity

_THREE = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
_SAMPLED = {**_THREE, "prompt_tuning_init": "SAMPLE_VOCAB"}
CASES = (Case("PROMPT_TUNING", "random", _THREE, ()), Case("PROMPT_TUNING", "sampled", _SAMPLED, ()))

PARITY = {
    "prompt": Parity("llama", "PromptTuningConfig", _THREE),
    "prompt on GPT-2": Parity("gpt2", "PromptTuningConfig", _THREE),
    "prompt classifier": Parity("classifier", "PromptTuningConfig", {**_THREE, "task_type": "SEQ_CLS"}),
}
PROMPTS = PARITY | {
    "prompt on BERT": Parity("bert", "PromptTuningConfig", {**_THREE, "task_type": "SEQ_CLS"}),
    "prompt on RoBERTa": Parity("roberta", "PromptTuningConfig", {**_THREE, "task_type": "SEQ_CLS"}),
    "prompt of features": Parity(
        "features", "PromptTuningConfig", {**_THREE, "task_type": "FEATURE_EXTRACTION"}
    ),
    "prompt of tokens' classes": Parity("tagger", "PromptTuningConfig", {**_THREE, "task_type": "TOKEN_CLS"}),
    "prompt of answers": Parity("answerer", "PromptTuningConfig", {**_THREE, "task_type": "QUESTION_ANS"}),
    "prompt on T5": Parity("t5", "PromptTuningConfig", {**_THREE, "task_type": "SEQ_2_SEQ_LM"}),
    "prompt on BART": Parity("bart", "PromptTuningConfig", {**_THREE, "task_type": "SEQ_2_SEQ_LM"}),
    "prompt of one submodule on T5": Parity(
        "t5", "PromptTuningConfig", {**_THREE, "task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 1}
    ),
}
