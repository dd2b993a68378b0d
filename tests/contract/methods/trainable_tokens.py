from tests.contract.case import LINEAR, Case, Field, Parity, tensors_of

CASES = (
    Case("TRAINABLE_TOKENS", "plain", {"token_indices": [3, 7, 0]}, (*LINEAR, "embedding")),
    Case(
        "TRAINABLE_TOKENS",
        "random start",
        {"token_indices": [5, 1, 2, 3, 4, 0, 6, 7], "init_weights": False},
        ("embedding", "linear"),
        is_fresh=False,
    ),
)

_TOKENS = {"task_type": "CAUSAL_LM", "token_indices": [5, 2, 63, 17]}
PARITY = {
    "trainable tokens": Parity("llama", "TrainableTokensConfig", _TOKENS),
    "trainable tokens of a name": Parity(
        "llama", "TrainableTokensConfig", {**_TOKENS, "target_modules": ["embed_tokens"]}
    ),
    "trainable tokens of a head": Parity(
        "llama", "TrainableTokensConfig", {**_TOKENS, "target_modules": ["lm_head"]}
    ),
    "trainable tokens of tied weights": Parity("gpt2", "TrainableTokensConfig", _TOKENS),
}


def _token_indices() -> None:
    given = {}
    few, more = (
        tensors_of("TRAINABLE_TOKENS", token_indices=value, **given) for value in ([5, 2], [5, 2, 3])
    )
    assert few.keys() == more.keys() and few != more


FIELD_BASE = {"token_indices": [5, 2, 3, 17, 40, 41, 42, 43, 44, 45]}
FIELDS = {
    "token_indices": (
        _token_indices,
        Field([64], "error"),
        Field([], "error"),
        Field([1, 1], "error"),
    ),
    "target_modules": Field(["lm_head"], "tensors"),
    "init_weights": Field(False, "start"),
}
