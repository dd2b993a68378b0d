from tests.contract.case import Case, Parity

_CONTEXT = {
    "task_type": "CAUSAL_LM",
    "cpt_token_ids": [5, 9, 2, 33, 7, 5, 9, 4, 33, 8],
    "cpt_tokens_type_mask": [1, 2, 2, 3, 4, 5, 6, 6, 7, 8],
}
_DECAY = {**_CONTEXT, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}
_KINDS = {"input_type_mask": [[1, 2, 2, 2, 3, 4, 4], [0, 0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 4, 4, 4]]}
CASES = (Case("CPT", "context", _CONTEXT, ()),)
PARITY: dict[str, Parity] = {}
PROMPTS = {
    "cpt": Parity("llama", "CPTConfig", _CONTEXT),
    "cpt of one token": Parity("llama", "CPTConfig", {"task_type": "CAUSAL_LM"}),
    "cpt with decay": Parity("gpt2", "CPTConfig", _DECAY, _KINDS),
}
