import pytest

import peft_dist
from tests.contract import bases
from tests.contract.case import Case, Parity

_ADAPTER = {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM"}
CASES = (Case("ADAPTION_PROMPT", "two layers", _ADAPTER, ()),)
PARITY = {
    "adaption prompt": Parity("llama", "AdaptionPromptConfig", _ADAPTER),
    "adaption prompt on the last": Parity("llama", "AdaptionPromptConfig", {**_ADAPTER, "adapter_layers": 1}),
    "adaption prompt on Mistral": Parity("mistral", "AdaptionPromptConfig", _ADAPTER),
    "adaption prompt on GPT-2": Parity("gpt2", "AdaptionPromptConfig", _ADAPTER),
}


def _refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        peft_dist.get_peft_model(
            bases.llama(), peft_dist.AdaptionPromptConfig(**{**FIELD_BASE, field: value})
        )


def _shapes(**values) -> list[tuple[str, tuple[int, ...]]]:
    model = peft_dist.get_peft_model(
        bases.llama(), peft_dist.AdaptionPromptConfig(**{**FIELD_BASE, **values})
    )
    return [(key, tuple(t.shape)) for key, t in peft_dist.get_peft_model_state_dict(model).items()]


def _sizes() -> None:
    assert _shapes() != _shapes(adapter_len=5) and len(_shapes(adapter_layers=2)) == 2 * len(_shapes())
    for field in ("adapter_len", "adapter_layers"):
        for value in (None, 0, 2.0):
            _refused(field, value)
    _refused("adapter_layers", 3)


FIELD_BASE = {"adapter_len": 4, "adapter_layers": 1}
FIELDS = {
    "target_modules": (lambda: _refused("target_modules", "mlp"), lambda: _refused("target_modules", "attn")),
    "adapter_len": _sizes,
    "adapter_layers": _sizes,
}
