"""The door to frozen weights: plain, on meta, and partitioned over two ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_dist import inject
from peft_dist.base_layer import Layer, door, has_door
from peft_dist.errors import BaseLayerError
from peft_dist.methods.activation.ia3 import IA3Config
from peft_dist.methods.weight.lora import LoraConfig
from peft_dist.model import PeftModel
from peft_dist.sharding import elements_at_rest, is_partitioned, partition_base
from tests.contract.cases import LAYERS, sample
from tests.ranks import run_on_ranks

kinds = pytest.mark.parametrize("kind", LAYERS)


def opened(kind: str) -> Layer:
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return door(layer, "name")


@kinds
def test_weight_applied_is_the_layer(kind) -> None:
    base, x = opened(kind), sample(kind)
    W, b = base.weight(), base.bias()
    assert tuple(W.shape) == base.shape == (base.site.out, base.site.in_)
    assert not W.requires_grad
    y = base.apply(W, x)
    if b is not None:
        y = y + b.view(-1, *(1,) * len(base.site.kernel))
    torch.testing.assert_close(y, base(x))


@kinds
def test_factors_applied_one_after_the_other(kind) -> None:
    base, x = opened(kind), sample(kind)
    groups = base.site.groups
    A = torch.randn(4, base.site.in_, dtype=torch.double)
    B = torch.randn(base.site.out, 4 // groups, dtype=torch.double)
    each = torch.bmm(B.unflatten(0, (groups, -1)), A.unflatten(0, (groups, -1)))
    torch.testing.assert_close(base.mix(B, base.apply(A, x)), base.apply(each.flatten(0, 1), x))


def test_rows_that_groups_do_not_divide() -> None:
    base, x = opened("conv1d with groups"), sample("conv1d with groups")
    with pytest.raises(BaseLayerError) as raised:
        base.apply(torch.zeros(3, base.site.in_, dtype=torch.double), x)
    assert str(raised.value) == (
        "name: 3 rows cannot be shared out over the 2 groups of this convolution. Choose a rank that the "
        "groups divide, or leave the layer out."
    )


@kinds
def test_substituted_weight_runs_and_gets_the_gradient(kind) -> None:
    base, x = opened(kind), sample(kind)
    W = torch.randn(base.shape, dtype=torch.double, requires_grad=True)
    with base.substituted(W):
        y = base(x)
    b = base.bias()
    wanted = base.apply(W, x) + (0 if b is None else b.view(-1, *(1,) * len(base.site.kernel)))
    torch.testing.assert_close(y, wanted)
    (gradient,) = torch.autograd.grad(y.sum(), W)
    assert gradient.abs().sum() > 0
    assert isinstance(base.layer.weight, nn.Parameter)


@kinds
def test_writing_and_restoring(kind) -> None:
    base = opened(kind)
    W, stored = base.weight().clone(), base.stored()
    dW = torch.randn(base.shape, dtype=torch.double)
    base.add_(dW)
    torch.testing.assert_close(base.weight(), W + dW)
    if base.site.bias:
        b = base.bias().clone()
        base.add_bias_(torch.ones_like(b))
        torch.testing.assert_close(base.bias(), b + 1)
    base.restore_(stored)
    assert torch.equal(base.weight(), W)


@kinds
def test_meta(kind) -> None:
    ghost = door(LAYERS[kind]().to("meta"), "name")
    assert ghost.site == opened(kind).site
    assert ghost.weight().is_meta
    with pytest.raises(BaseLayerError) as raised:
        ghost.add_(torch.zeros(ghost.shape))
    assert str(raised.value) == "name.weight is on the meta device: load the base before changing it."


def test_no_bias_to_add_to() -> None:
    with pytest.raises(BaseLayerError) as raised:
        opened("linear without bias").add_bias_(torch.zeros(8))
    assert str(raised.value) == "name: this layer has no bias to add to. Do not merge; keep the adapter."


def test_layers_without_a_door() -> None:
    assert not has_door(nn.LayerNorm(4))
    with pytest.raises(BaseLayerError) as raised:
        door(nn.LayerNorm(4), "norm")
    assert str(raised.value) == (
        "norm: a LayerNorm cannot be adapted; Linear, Conv1D, Embedding, Conv1d, Conv2d, Conv3d and "
        "MultiheadAttention can. Name other layers, or train it whole by modules_to_save."
    )
    with pytest.raises(BaseLayerError) as raised:
        door(nn.MultiheadAttention(4, 2, kdim=3), "attn")
    assert str(raised.value) == (
        "attn: a MultiheadAttention with kdim or vdim unlike embed_dim keeps three projections apart; only one "
        "whose query, key and value have the same width can be adapted. Leave it out, or train it whole by "
        "modules_to_save."
    )
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(BaseLayerError) as raised:
        door(layer, "coded")
    assert str(raised.value) == (
        "coded: a Linear whose weight is stored as torch.int8. Of quantised layers only bitsandbytes' "
        "Linear8bitLt and Linear4bit can be adapted; load the base in one of those."
    )


def test_padding_and_scale_of_embeddings() -> None:
    layer = nn.Embedding(6, 4, padding_idx=2)
    base = door(layer, "name")
    W = torch.randn(4, 6, requires_grad=True)
    base.apply(W, torch.tensor([[1, 2]])).sum().backward()
    assert not W.grad[:, 2].any() and W.grad[:, 1].all()
    layer.embed_scale = 3.0
    torch.testing.assert_close(base.apply(W, torch.tensor([1])), 3 * W[:, 1][None])


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.one, self.two, self.head = nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 20)

    def forward(self, ids):
        return self.head(self.two(self.one(self.embed(ids)).tanh()))


ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
CONFIGS = {
    "lora": lambda: LoraConfig(r=2, target_modules=["embed", "one"], bias="all", modules_to_save=["head"]),
    "ia3": lambda: IA3Config(target_modules=["one", "two"], feedforward_modules=["two"]),
}


def built(name: str) -> PeftModel:
    torch.manual_seed(0)
    return PeftModel(Base(), CONFIGS[name]())


def disturb(model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.adapter_tensors().values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)


def outcome(model: PeftModel, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    y = model(ids)
    y.square().sum().backward()
    return y.detach(), {key: p.grad.clone() for key, p in model.adapter_tensors().items()}


def partitioned_ranks(name: str, inject_after: bool) -> tuple:
    ids = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(1))
    whole = built(name)
    disturb(whole)
    wanted = outcome(whole, ids)
    if inject_after:
        torch.manual_seed(0)
        model = PeftModel(Base(), None)
        partition_base(model, ZERO3)
        model._add("default", CONFIGS[name](), True, False, start=True)
        model.set_adapter("default")
        with torch.no_grad():
            for key, p in model.adapter_tensors().items():
                # What starts from the base must have started from the whole of it.
                if "lora_own_bias" in key or key.endswith(("bias", "head.weight")):
                    torch.testing.assert_close(p, built(name).adapter_tensors()[key])
                p.copy_(whole.adapter_tensors()[key])
    else:
        model = built(name)
        disturb(model)
        partition_base(model, ZERO3)
    weights = [m.base.layer.weight for _, m in inject.adapter_modules(model.get_base_model())]
    assert all(is_partitioned(w) and w.numel() == 0 for w in weights)
    got = outcome(model, ids)
    rest = elements_at_rest(model)
    shapes = [
        m.base.shape == tuple(m.base.weight().shape)
        for _, m in inject.adapter_modules(model.get_base_model())
    ]
    shapes = shapes if name == "ia3" else []
    again = elements_at_rest(model)
    model.merge_adapter()
    merged = model(ids).detach()
    model.unmerge_adapter()
    after = model(ids).detach()
    return wanted, got, rest, again, all(shapes), merged, after


@pytest.mark.parametrize("inject_after", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_partitioned_base_gives_one_process_results(name, inject_after) -> None:
    adapter = sum(p.numel() for p in built(name).adapter_tensors().values())
    base = sum(p.numel() for p in Base().parameters())
    for wanted, got, rest, again, shapes, merged, after in run_on_ranks(
        partitioned_ranks, 2, name, inject_after
    ):
        # fp32 sums in one order: only collectives' copies lie between, which are exact.
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=1e-6)
        for key, gradient in wanted[1].items():
            torch.testing.assert_close(got[1][key], gradient, rtol=1e-5, atol=1e-5)
        # At rest a rank holds its half of the base, each piece padded to an even length.
        assert rest == again <= adapter + base // 2 + 8
        assert shapes
        torch.testing.assert_close(merged, wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after, wanted[0], rtol=1e-6, atol=1e-6)


def raw_reads() -> tuple[int, ...]:
    torch.manual_seed(0)
    model = PeftModel(Base(), CONFIGS["ia3"]())
    partition_base(model, ZERO3)
    return tuple(model.get_base_model().one.base.layer.weight.shape)


def test_without_the_door_a_partitioned_weight_is_empty() -> None:
    """The negative control: what the door gives is not what the layer's attribute shows."""
    assert run_on_ranks(raw_reads, 2) == [(0,), (0,)]


def test_copying_a_door_copies_its_layer() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 3))
    inject.inject(base, LoraConfig(r=1, target_modules=["0"]), "a", inject.Adapters())
    twin = copy.deepcopy(base)
    assert twin[0].base.layer is twin[0].base_layer is not base[0].base_layer
