"""Layers whose weight is a function's argument, partitioned over two ranks by ZeRO-3: as in one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_dist import inject
from peft_dist.methods.weight.lora import LoraConfig
from peft_dist.model import PeftModel
from peft_dist.rows import BASE
from peft_dist.sharding import elements_at_rest, is_partitioned, partition_base
from tests.contract.test_arguments import Attention, Mixture
from tests.peft_dist.test_base_layer import ZERO3, disturb, outcome
from tests.ranks import run_on_ranks


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.attention, self.mixture = Attention(), Mixture()
        self.head = nn.Linear(12, 20)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        h = h + self.attention(h)
        return self.head(h + self.mixture(h))


def config() -> LoraConfig:
    return LoraConfig(
        r=2,
        target_modules=["attn", "head"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj", "router.weight"],
    )


def built() -> PeftModel:
    torch.manual_seed(0)
    return PeftModel(Base(), config())


def partitioned_ranks(inject_after: bool) -> tuple:
    ids = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(1))
    whole = built()
    disturb(whole)
    wanted = outcome(whole, ids)
    names = ["default", BASE, "default"]
    rows_wanted = whole(ids, adapter_names=names).detach()
    if inject_after:
        torch.manual_seed(0)
        model = PeftModel(Base(), None)
        partition_base(model, ZERO3)
        model._add("default", config(), True, False, start=True)
        model.set_adapter("default")
        with torch.no_grad():
            for key, p in model.adapter_tensors().items():
                p.copy_(whole.adapter_tensors()[key])
    else:
        model = built()
        disturb(model)
        partition_base(model, ZERO3)
    base = model.get_base_model()
    assert all(is_partitioned(m.base.parameter) for _, m in inject.adapter_modules(base))
    assert all(m.base.parameter.numel() == 0 for _, m in inject.adapter_modules(base))
    got = outcome(model, ids)
    # With gradients it would fetch ahead for a backward that does not come.
    with torch.no_grad():
        rows = model(ids, adapter_names=names)
    rest = elements_at_rest(model)
    model.merge_adapter()
    merged = model(ids).detach()
    model.unmerge_adapter()
    after = model(ids).detach()
    return wanted, got, rows_wanted, rows, rest, merged, after


@pytest.mark.parametrize("inject_after", [False, True])
def test_partitioned_arguments_give_one_process_results(inject_after) -> None:
    adapter = sum(p.numel() for p in built().adapter_tensors().values())
    parameters = list(Base().parameters())
    base = sum(p.numel() for p in parameters)
    for wanted, got, rows_wanted, rows, rest, merged, after in run_on_ranks(
        partitioned_ranks, 2, inject_after
    ):
        # fp32: a gathered weight lies otherwise in memory, so that products may sum in another order.
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-5)
        for key, gradient in wanted[1].items():
            assert (got[1][key] - gradient).abs().max() <= 1e-5 * gradient.abs().max()
        torch.testing.assert_close(rows, rows_wanted, rtol=1e-5, atol=1e-5)
        # At rest a rank holds its half of the base, each piece padded to an even length.
        assert rest <= adapter + base // 2 + len(parameters)
        torch.testing.assert_close(merged, wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after, wanted[0], rtol=1e-5, atol=1e-5)
