import json
from functools import partial

import torch

import peft_dist
from peft_dist import CPTConfig
from tests.contract import bases
from tests.contract.case import Case, Field, Parity
from tests.contract.vocabularies import recorded

_CONTEXT = {
    "task_type": "CAUSAL_LM",
    "cpt_token_ids": [5, 9, 2, 33, 7, 5, 9, 4, 33, 8],
    "cpt_tokens_type_mask": [1, 2, 2, 3, 4, 5, 6, 6, 7, 8],
}
_DECAY = {**_CONTEXT, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}
_KINDS = {"input_type_mask": [[1, 2, 2, 2, 3, 4, 4], [0, 0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 4, 4, 4]]}
CASES = (Case("CPT", "context", _CONTEXT, ()),)
PARITY = {
    "cpt": Parity("llama", "CPTConfig", _CONTEXT),
    "cpt of one token": Parity("llama", "CPTConfig", {"task_type": "CAUSAL_LM"}),
    "cpt with decay": Parity("gpt2", "CPTConfig", _DECAY, _KINDS),
}


def _corrected(field: str, tmp_path) -> None:
    """The context says how many there are, the base the rest."""
    config = CPTConfig(**_CONTEXT, **{field: 7})
    peft_dist.get_peft_model(bases.llama(), config).save_pretrained(tmp_path)
    file = json.loads((tmp_path / "adapter_config.json").read_text())
    sizes = {"token_dim": 16, "num_layers": 2, "num_attention_heads": 2, "num_transformer_submodules": 1}
    assert file[field] == {**sizes, "num_virtual_tokens": 10}[field]


def _context() -> None:
    """The tokens are those of the ids, one id of the vocabulary where none is given."""
    table = bases.llama().get_input_embeddings().weight
    for given, ids in ((_CONTEXT, _CONTEXT["cpt_token_ids"]), ({"task_type": "CAUSAL_LM"}, [0])):
        model = peft_dist.get_peft_model(bases.llama(), CPTConfig(**given))
        assert torch.equal(peft_dist.get_peft_model_state_dict(model)["prompt_embeddings"], table[ids])


FIELD_BASE = _CONTEXT
FIELDS = {
    **{
        field: partial(_corrected, field)
        for field in (
            "num_virtual_tokens",
            "token_dim",
            "num_transformer_submodules",
            "num_layers",
            "num_attention_heads",
        )
    },
    "task_type": Field("SEQ_CLS", "error"),
    "cpt_token_ids": _context,
    "cpt_mask": Field([1], "error"),
    "cpt_tokens_type_mask": (Field([1], "error"), Field([1, 2, 3, 4] * 2 + [1, 2], "loss")),
    "opt_weighted_loss_type": (Field("decay", "loss", {"opt_loss_decay_factor": 0.5}), Field("sum", "error")),
    "opt_loss_decay_factor": Field(0.5, "loss", {"opt_weighted_loss_type": "decay"}),
    "opt_projection_epsilon": Field(0.5, "output"),
    "opt_projection_format_epsilon": Field(0.5, "output"),
    "tokenizer_name_or_path": lambda tmp_path: recorded(
        CPTConfig, "tokenizer_name_or_path", "words", _CONTEXT, tmp_path
    ),
}
