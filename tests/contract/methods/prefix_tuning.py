import peft_dist
from peft_dist import PrefixTuningConfig
from tests.contract import bases
from tests.contract.case import Case, Field, Parity
from tests.contract.vocabularies import counted

_FOUR = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
_PROJECTED = {**_FOUR, "prefix_projection": True, "encoder_hidden_size": 8}
_PAIR = {**_FOUR, "task_type": "SEQ_2_SEQ_LM"}
CASES = (
    Case("PREFIX_TUNING", "plain", _FOUR, ()),
    Case("PREFIX_TUNING", "projected", _PROJECTED, ()),
    Case("PREFIX_TUNING", "zero", {**_FOUR, "init_weights": "zero"}, ()),
)
PARITY = {
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

_GIVEN = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
_PAIRED = {"task_type": "SEQ_2_SEQ_LM"}


def _made_by(**values) -> set[str]:
    model = peft_dist.get_peft_model(bases.llama(), PrefixTuningConfig(**_GIVEN, **values))
    return {f"{n} {tuple(p.shape)}" for n, p in model.named_parameters() if n.startswith("prompt_encoder")}


def _projected() -> None:
    plain, mlp = _made_by(), _made_by(prefix_projection=True)
    assert plain != mlp != _made_by(prefix_projection=True, encoder_hidden_size=5)


FIELDS = {
    "num_virtual_tokens": lambda: counted(PrefixTuningConfig),
    "token_dim": Field(99, "error"),
    "num_transformer_submodules": (
        Field(1, "output", _PAIRED, base="t5"),
        Field(2, "error"),
        Field(3, "error", _PAIRED, base="t5"),
    ),
    "num_layers": Field(1, "error"),
    "num_attention_heads": Field(3, "error"),
    "init_weights": (Field("zero", "start"), Field("one", "error")),
    "encoder_hidden_size": _projected,
    "prefix_projection": _projected,
}
