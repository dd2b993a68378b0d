import pytest

import peft_dist
from tests.contract import bases
from tests.contract.case import LINEAR, Case, Field, Parity

# Of the sizes of the laws' layers, 12 and 8, two bases of rank 6 make a factor of a weight's size, (12, 8).
CASES = (
    Case("RANDLORA", "plain", {"r": 6, "randlora_alpha": 9}, LINEAR),
    Case("RANDLORA", "sparse", {"r": 6, "randlora_alpha": 9, "sparse": True}, ("linear",)),
    Case("RANDLORA", "very sparse", {"r": 6, "randlora_alpha": 9, "very_sparse": True}, ("linear",)),
    Case("RANDLORA", "bias", {"r": 6, "bias": "randlora_only"}, ("linear", "Conv1D")),
    Case("RANDLORA", "random start", {"r": 6, "init_weights": False}, ("linear",), is_fresh=False),
)

_RAND = {"r": 5, "randlora_alpha": 2, "task_type": "CAUSAL_LM"}
_UNEQUAL = {**_RAND, "target_modules": ["q_proj", "up_proj", "down_proj"], "projection_prng_key": 3}
PARITY = {
    "randlora": Parity("llama", "RandLoraConfig", _RAND),
    "randlora on layers of several sizes": Parity("llama", "RandLoraConfig", _UNEQUAL),
    "randlora without projections": Parity("llama", "RandLoraConfig", {**_UNEQUAL, "save_projection": False}),
    "randlora, sparse": Parity("llama", "RandLoraConfig", {**_UNEQUAL, "sparse": True}),
    "randlora, very sparse, without projections": Parity(
        "llama", "RandLoraConfig", {**_UNEQUAL, "very_sparse": True, "save_projection": False}
    ),
    "randlora on Conv1D": Parity("gpt2", "RandLoraConfig", {**_RAND, "fan_in_fan_out": True}),
    "randlora with biases of targets": Parity("llama", "RandLoraConfig", {**_RAND, "bias": "randlora_only"}),
    "randlora with a random start": Parity("llama", "RandLoraConfig", {**_RAND, "init_weights": False}),
}


def pattern_of_layers() -> None:
    """HF PEFT allows it alone, without effect; beside indices it says which list they count."""
    peft_dist.RandLoraConfig(layers_pattern="layers")
    config = peft_dist.RandLoraConfig(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="h")
    with pytest.raises(ValueError, match="layers_to_transform"):
        peft_dist.get_peft_model(bases.llama(), config)


FIELD_BASE = {"target_modules": ["q_proj", "v_proj"], "r": 5, "randlora_alpha": 4}
FIELDS = {
    "r": (Field(3, "tensors"), Field(0, "error")),
    "projection_prng_key": Field(1, "output"),
    "save_projection": Field(False, "tensors"),
    "sparse": Field(True, "output"),
    "very_sparse": Field(True, "output"),
    "randlora_dropout": (Field(0.5, "training"), Field(1.0, "error")),
    "randlora_alpha": Field(3, "output"),
    "init_weights": Field(False, "start"),
    "layers_pattern": pattern_of_layers,
}
