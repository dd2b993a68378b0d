import pytest

import peft_dist
from tests.contract import bases
from tests.contract.case import LINEAR, Case, Field, Parity

_BANK = {"num_vectors": 9, "vector_length": 4, "r": 3, "init_vector_bank_bound": 0.5}
CASES = (
    # Logits and the bank are random from the start, as in the paper.
    Case("VBLORA", "plain", _BANK, LINEAR, is_fresh=False),
    Case("VBLORA", "three of nine", {**_BANK, "topk": 3}, ("linear",), is_fresh=False),
    Case("VBLORA", "bias", {**_BANK, "bias": "vblora_only"}, ("linear", "Conv1D"), is_fresh=False),
)

_VB = {"num_vectors": 9, "vector_length": 8, "r": 3, "task_type": "CAUSAL_LM"}
_UNEQUAL = {**_VB, "target_modules": ["q_proj", "up_proj", "down_proj"], "topk": 3}
PARITY = {
    "vblora": Parity("llama", "VBLoRAConfig", _VB),
    "vblora on layers of several sizes": Parity("llama", "VBLoRAConfig", _UNEQUAL),
    "vblora on Conv1D": Parity("gpt2", "VBLoRAConfig", {**_VB, "fan_in_fan_out": True}),
    "vblora with biases of targets": Parity("llama", "VBLoRAConfig", {**_VB, "bias": "vblora_only"}),
    "vblora with all biases": Parity("llama", "VBLoRAConfig", {**_VB, "bias": "all"}),
}


def length_of_vectors() -> None:
    """The default, 256, does not divide the sizes of a small base; a length that does shapes bank and pieces."""
    config = peft_dist.VBLoRAConfig(target_modules=["q_proj"], num_vectors=9)
    with pytest.raises(ValueError, match=r"q_proj: vector_length 256 does not divide its in size 16"):
        peft_dist.get_peft_model(bases.llama(), config)
    for length in (4, 8):
        config = peft_dist.VBLoRAConfig(target_modules=["q_proj"], num_vectors=9, vector_length=length)
        saved = peft_dist.get_peft_model_state_dict(peft_dist.get_peft_model(bases.llama(), config))
        assert saved["base_model.vblora_vector_bank"].shape == (9, length)
        assert (
            saved["base_model.model.model.layers.0.self_attn.q_proj.vblora_logits_A"].shape[1] == 16 // length
        )


FIELD_BASE = {"target_modules": ["q_proj", "v_proj"], "num_vectors": 9, "vector_length": 8}
FIELDS = {
    "r": (Field(3, "tensors"), Field(0, "error")),
    "num_vectors": (Field(11, "tensors"), Field(0, "error")),
    "vector_length": (length_of_vectors, Field(5, "error")),
    "topk": (Field(3, "output"), Field(0, "error"), Field(10, "error")),
    "save_only_topk_weights": Field(True, "tensors"),
    "vblora_dropout": (Field(0.5, "training"), Field(1.0, "error")),
    "init_vector_bank_bound": Field(0.5, "start"),
    "init_logits_std": Field(0.5, "start"),
}
