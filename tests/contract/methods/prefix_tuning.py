from tests.contract.case import Case, Parity

_FOUR = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
_PROJECTED = {**_FOUR, "prefix_projection": True, "encoder_hidden_size": 8}
_PAIR = {**_FOUR, "task_type": "SEQ_2_SEQ_LM"}
CASES = (
    Case("PREFIX_TUNING", "plain", _FOUR, ()),
    Case("PREFIX_TUNING", "projected", _PROJECTED, ()),
    Case("PREFIX_TUNING", "zero", {**_FOUR, "init_weights": "zero"}, ()),
)
PARITY: dict[str, Parity] = {}
PROMPTS = {
    "prefix": Parity("llama", "PrefixTuningConfig", _FOUR),
    "prefix of fewer heads": Parity("grouped", "PrefixTuningConfig", _FOUR),
    "prefix on GPT-2": Parity("gpt2", "PrefixTuningConfig", _PROJECTED),
    "prefix classifier": Parity("classifier", "PrefixTuningConfig", {**_FOUR, "task_type": "SEQ_CLS"}),
    "prefix on BERT": Parity("bert", "PrefixTuningConfig", {**_FOUR, "task_type": "SEQ_CLS"}),
    "prefix on RoBERTa": Parity("roberta", "PrefixTuningConfig", {**_PROJECTED, "task_type": "SEQ_CLS"}),
    "prefix of tokens' classes": Parity("tagger", "PrefixTuningConfig", {**_FOUR, "task_type": "TOKEN_CLS"}),
    "prefix of answers": Parity("answerer", "PrefixTuningConfig", {**_FOUR, "task_type": "QUESTION_ANS"}),
    "prefix of features": Parity(
        "features", "PrefixTuningConfig", {**_FOUR, "task_type": "FEATURE_EXTRACTION"}
    ),
    "prefix on T5": Parity("t5", "PrefixTuningConfig", _PAIR),
    "prefix by an MLP on T5": Parity("t5", "PrefixTuningConfig", {**_PROJECTED, "task_type": "SEQ_2_SEQ_LM"}),
    "prefix on BART": Parity("bart", "PrefixTuningConfig", _PAIR),
}
