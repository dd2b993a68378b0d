import pytest
import torch

import peft_dist
from tests.contract import bases
from tests.contract.case import LINEAR, Case, Field, Parity

CASES = (
    Case("VERA", "plain", {"r": 5}, LINEAR),
    Case("VERA", "projections drawn again", {"r": 5, "save_projection": False}, ("linear",)),
    Case("VERA", "bias", {"r": 5, "bias": "vera_only"}, ("linear", "Conv1D")),
    Case("VERA", "random start", {"r": 5, "init_weights": False}, ("linear",), is_fresh=False),
)

_VERA = {"r": 6, "task_type": "CAUSAL_LM"}
_UNEQUAL = {**_VERA, "target_modules": ["q_proj", "up_proj", "down_proj"]}
PARITY = {
    "vera": Parity("llama", "VeraConfig", _VERA),
    "vera on layers of several sizes": Parity("llama", "VeraConfig", {**_UNEQUAL, "projection_prng_key": 3}),
    "vera without projections": Parity(
        "llama", "VeraConfig", {**_UNEQUAL, "projection_prng_key": 3, "save_projection": False}
    ),
    "vera on Conv1D": Parity("gpt2", "VeraConfig", {**_VERA, "fan_in_fan_out": True}),
    "vera with biases of targets": Parity("llama", "VeraConfig", {**_VERA, "bias": "vera_only"}),
    "vera with all biases": Parity("llama", "VeraConfig", {**_VERA, "bias": "all"}),
    "vera with a random start": Parity("llama", "VeraConfig", {**_VERA, "init_weights": False}),
    "vera classifier": Parity("classifier", "VeraConfig", {"r": 4, "task_type": "SEQ_CLS"}),
}

FIELD_BASE = {"target_modules": ["q_proj", "v_proj"], "r": 4}


def key_of_projections() -> None:
    """Another key draws other projections, and one model's adapters have the same."""
    kept = [
        peft_dist.get_peft_model_state_dict(
            peft_dist.get_peft_model(
                bases.llama(), peft_dist.VeraConfig(**FIELD_BASE, projection_prng_key=key)
            )
        )["base_model.vera_A"]
        for key in (0, 1)
    ]
    assert not torch.equal(*kept)
    model = peft_dist.get_peft_model(bases.llama(), peft_dist.VeraConfig(**FIELD_BASE))
    with pytest.raises(
        ValueError, match=r"projection_prng_key: 1; it must be the same .* that is there has 0"
    ):
        model.add_adapter("other", peft_dist.VeraConfig(**FIELD_BASE, projection_prng_key=1))
    assert list(model.peft_config) == ["default"]


FIELDS = {
    "r": (Field(3, "tensors"), Field(0, "error")),
    "projection_prng_key": key_of_projections,
    "save_projection": Field(False, "tensors"),
    "vera_dropout": (Field(0.5, "training"), Field(1.0, "error")),
    "d_initial": Field(0.7, "start"),
    "init_weights": Field(False, "start"),
}
