"""A rank over a layer's size, refused before the base is touched."""

from __future__ import annotations

import pytest
from torch import nn

import peft_dist
from peft_dist.errors import ConfigError


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.wave = nn.Conv1d(4, 6, 3, groups=2)
        self.up = nn.Linear(6, 12)


CONFIGS = {
    "LORA": lambda **v: peft_dist.LoraConfig(r=13, **v),
    "ADALORA": lambda **v: peft_dist.AdaLoraConfig(init_r=13, total_step=10, **v),
    "LOHA": lambda **v: peft_dist.LoHaConfig(r=13, **v),
    "DELORA": lambda **v: peft_dist.DeloraConfig(r=13, **v),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_rank_over_both_sizes_of_a_layer(method) -> None:
    base = Base()
    before = dict(base.named_modules())
    with pytest.raises(ConfigError) as raised:
        peft_dist.inject_adapter_in_model(CONFIGS[method](target_modules=["up"]), base)
    assert str(raised.value) == (
        f"{method}: a rank of 13 at 'up', whose weight is 12 x 6. A rank over 6 adds nothing there; choose a "
        "smaller one."
    )
    assert dict(base.named_modules()) == before
    assert all(p.requires_grad for p in base.parameters())


def test_sizes_of_other_kinds() -> None:
    for name, r, out, in_ in (("embed", 21, 6, 20), ("wave", 14, 6, 12)):
        with pytest.raises(ConfigError, match=f"a rank of {r} at '{name}', whose weight is {out} x {in_}"):
            peft_dist.inject_adapter_in_model(peft_dist.LoraConfig(r=r, target_modules=[name]), Base())
    with pytest.raises(ConfigError, match=r"a rank of 13 at 'up\.weight', whose weight is 12 x 6"):
        peft_dist.inject_adapter_in_model(
            peft_dist.LoraConfig(r=13, target_modules=[], target_parameters=["up.weight"]), Base()
        )


def test_a_rank_that_one_size_has() -> None:
    """HF PEFT's programs take one rank for all layers, small ones included."""
    peft_dist.inject_adapter_in_model(peft_dist.LoraConfig(r=12, target_modules=["up"]), Base())
