import pytest

import peft_dist
from peft_dist import PromptEncoderConfig
from tests.contract import bases
from tests.contract.case import Case, Field, Parity
from tests.contract.vocabularies import counted, recorded

_FOUR = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "encoder_hidden_size": 8}
_LSTM = {**_FOUR, "encoder_reparameterization_type": "LSTM"}
_PAIR = {**_FOUR, "task_type": "SEQ_2_SEQ_LM"}
CASES = (Case("P_TUNING", "mlp", _FOUR, ()), Case("P_TUNING", "lstm", _LSTM, ()))
PARITY = {
    "p-tuning": Parity("llama", "PromptEncoderConfig", _FOUR),
    "p-tuning by an LSTM": Parity("gpt2", "PromptEncoderConfig", _LSTM),
    "p-tuning by a deep LSTM": Parity("llama", "PromptEncoderConfig", {**_LSTM, "encoder_num_layers": 3}),
    "p-tuning classifier": Parity("classifier", "PromptEncoderConfig", {**_FOUR, "task_type": "SEQ_CLS"}),
    "p-tuning on BERT": Parity("bert", "PromptEncoderConfig", {**_FOUR, "task_type": "SEQ_CLS"}),
    "p-tuning on T5": Parity("t5", "PromptEncoderConfig", _PAIR),
    "p-tuning on BART": Parity("bart", "PromptEncoderConfig", _PAIR),
}

_GIVEN = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
_PAIRED = {"task_type": "SEQ_2_SEQ_LM"}


def _ignored_by_an_mlp() -> None:
    with pytest.warns(UserWarning, match="encoder_num_layers: 3 is ignored for MLP"):
        peft_dist.get_peft_model(bases.llama(), PromptEncoderConfig(**_GIVEN, encoder_num_layers=3))


def _heads(**values) -> set[str]:
    """What makes the tokens, by its shapes in the model."""
    model = peft_dist.get_peft_model(bases.llama(), PromptEncoderConfig(**_GIVEN, **values))
    return {f"{n} {tuple(p.shape)}" for n, p in model.named_parameters() if n.startswith("prompt_encoder")}


def _sizes() -> None:
    lstm = {"encoder_reparameterization_type": "LSTM"}
    assert _heads() != _heads(encoder_hidden_size=7) and _heads() != _heads(**lstm)
    assert _heads(**lstm) < _heads(**lstm, encoder_num_layers=3)


FIELDS = {
    "num_virtual_tokens": lambda: counted(PromptEncoderConfig),
    "token_dim": Field(99, "error"),
    "num_transformer_submodules": (
        Field(1, "tensors", _PAIRED, base="t5"),
        Field(2, "error"),
        Field(3, "error", _PAIRED, base="t5"),
    ),
    "num_layers": lambda tmp_path: recorded(PromptEncoderConfig, "num_layers", 7, _GIVEN, tmp_path),
    "num_attention_heads": lambda tmp_path: recorded(
        PromptEncoderConfig, "num_attention_heads", 7, _GIVEN, tmp_path
    ),
    "encoder_reparameterization_type": (Field("GRU", "error"), _sizes),
    "encoder_hidden_size": _sizes,
    "encoder_num_layers": (_sizes, _ignored_by_an_mlp),
    "encoder_dropout": (
        Field(0.5, "training", {"encoder_reparameterization_type": "LSTM"}),
        Field(1.0, "error"),
    ),
}
