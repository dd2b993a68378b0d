from functools import partial

from peft_dist import PromptTuningConfig
from tests.contract.case import Case, Field, Parity
from tests.contract.vocabularies import counted, recorded, starts_from_text

_THREE = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
_SAMPLED = {**_THREE, "prompt_tuning_init": "SAMPLE_VOCAB"}
CASES = (Case("PROMPT_TUNING", "random", _THREE, ()), Case("PROMPT_TUNING", "sampled", _SAMPLED, ()))

PARITY = {
    "prompt": Parity("llama", "PromptTuningConfig", _THREE),
    "prompt on GPT-2": Parity("gpt2", "PromptTuningConfig", _THREE),
    "prompt classifier": Parity("classifier", "PromptTuningConfig", {**_THREE, "task_type": "SEQ_CLS"}),
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

_GIVEN = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
_PAIRED = {"task_type": "SEQ_2_SEQ_LM"}
_TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": "t"}
_from_text = partial(starts_from_text, PromptTuningConfig)
FIELDS = {
    "num_virtual_tokens": lambda: counted(PromptTuningConfig),
    "token_dim": Field(99, "error"),
    "num_transformer_submodules": (
        Field(1, "tensors", _PAIRED, base="t5"),
        Field(2, "error"),
        Field(3, "error", _PAIRED, base="t5"),
    ),
    "num_layers": lambda tmp_path: recorded(PromptTuningConfig, "num_layers", 7, _GIVEN, tmp_path),
    "num_attention_heads": lambda tmp_path: recorded(
        PromptTuningConfig, "num_attention_heads", 7, _GIVEN, tmp_path
    ),
    "prompt_tuning_init": (Field("SAMPLE_VOCAB", "start"), Field("ZERO", "error")),
    "prompt_tuning_init_text": (lambda tmp_path: _from_text(tmp_path), Field(None, "error", _TEXT)),
    "tokenizer_name_or_path": (lambda tmp_path: _from_text(tmp_path), Field("", "error", _TEXT)),
    "tokenizer_kwargs": (lambda tmp_path: _from_text(tmp_path), Field({"a": 1}, "error")),
}
