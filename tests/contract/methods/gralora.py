import pytest

import peft_dist
from tests.contract import bases
from tests.contract.case import LINEAR, Case, Field, Parity

CASES = (
    Case("GRALORA", "plain", {"r": 4, "alpha": 6}, LINEAR),
    Case("GRALORA", "four blocks to a side", {"r": 4, "gralora_k": 4}, ("linear",)),
    Case("GRALORA", "one block", {"r": 3, "gralora_k": 1}, ("linear",)),
    Case("GRALORA", "hybrid", {"r": 4, "hybrid_r": 3}, LINEAR),
    Case("GRALORA", "bias", {"r": 4, "hybrid_r": 3, "bias": "gralora_only"}, ("linear", "Conv1D")),
    Case("GRALORA", "random start", {"r": 4, "init_weights": False}, ("linear",), is_fresh=False),
)

_GRA = {"r": 4, "alpha": 6, "task_type": "CAUSAL_LM"}
_ALL = {**_GRA, "target_modules": "all-linear"}
PARITY = {
    "gralora": Parity("llama", "GraloraConfig", _GRA),
    "gralora on all linear": Parity("llama", "GraloraConfig", {**_ALL, "gralora_k": 4}),
    "gralora hybrid": Parity("llama", "GraloraConfig", {**_ALL, "hybrid_r": 3}),
    "gralora on Conv1D": Parity("gpt2", "GraloraConfig", {**_GRA, "hybrid_r": 3, "fan_in_fan_out": True}),
    "gralora with biases of targets": Parity("llama", "GraloraConfig", {**_GRA, "bias": "gralora_only"}),
    "gralora with a random start": Parity("llama", "GraloraConfig", {**_GRA, "init_weights": False}),
    "gralora classifier": Parity("classifier", "GraloraConfig", {"r": 4, "task_type": "SEQ_CLS"}),
}


def rank() -> None:
    """Also the default, 32, which is over the sizes of a small base: a rank is that of k x k blocks."""
    for r in (4, 32):
        model = peft_dist.get_peft_model(
            bases.llama(), peft_dist.GraloraConfig(r=r, target_modules=["q_proj"])
        )
        shapes = {tuple(t.shape) for t in peft_dist.get_peft_model_state_dict(model).values()}
        assert shapes == {(2, 8, r), (2, r, 8)}


def pattern_of_layers() -> None:
    """HF PEFT allows it alone, without effect; beside indices it says which list they count."""
    peft_dist.GraloraConfig(layers_pattern="layers")
    config = peft_dist.GraloraConfig(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="h")
    with pytest.raises(ValueError, match="layers_to_transform"):
        peft_dist.get_peft_model(bases.llama(), config)


FIELD_BASE = {"target_modules": ["q_proj", "v_proj"], "r": 4}
FIELDS = {
    "r": (rank, Field(0, "error"), Field(5, "error")),
    "hybrid_r": (Field(3, "tensors"), Field(-1, "error")),
    "alpha": Field(3, "output"),
    "gralora_dropout": (Field(0.5, "training"), Field(1.0, "error")),
    "gralora_k": (Field(4, "tensors"), Field(0, "error"), Field(3, "error", {"r": 6})),
    "init_weights": Field(False, "start"),
    "layers_pattern": pattern_of_layers,
}
