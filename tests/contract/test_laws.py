"""The laws of `peft_dist.contract`, over every row of the catalog: a method is tested by having a case.

float64 throughout, so equalities hold to rounding: 1e-12 relative is some thousand times its unit.
"""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torch import Tensor

from peft_dist import inject, merge
from peft_dist.adapted import Adapted, Adjusted
from peft_dist.catalog import METHODS, config_class, prefix_of
from peft_dist.config import PeftConfig
from peft_dist.contract import WeightMethod
from peft_dist.errors import AdapterError
from peft_dist.rows import BASE, Rows
from tests.contract.cases import (
    CASES,
    LARGE,
    SITE_IDS,
    SITES,
    adapted,
    disturb,
    run_with,
    sample,
    target,
)

sites = pytest.mark.parametrize(("case", "kind"), SITES, ids=SITE_IDS)
cases = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.method}-{case.label}".replace(" ", "_")
)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_every_method_has_a_case() -> None:
    assert {case.method for case in CASES} == set(METHODS)


@sites
def test_law_1_fresh_adapter_changes_nothing(case, kind) -> None:
    base, _ = adapted(case, kind)
    x = sample(kind)
    difference = (base(x) - target(base).base_layer(x)).abs().max().item()
    assert (difference < 1e-12) == case.is_fresh


@sites
def test_law_2_forward_is_the_layer_with_the_delta(case, kind) -> None:
    base, _ = adapted(case, kind)
    disturb(base)
    x = sample(kind)
    got = base(x)
    assert (got - target(base).base_layer(x)).abs().max() > 1e-3
    close(got, run_with(target(base), ["a"], x))


@sites
def test_law_2_mixed_is_forward_row_by_row(case, kind) -> None:
    base, shared = adapted(case, kind, "a", "b", "c")
    disturb(base)
    choices = ("b", "a", BASE, "c", "b", None, "a", "c")
    x = sample(kind, rows=len(choices))
    x.requires_grad_(x.is_floating_point())
    alone, gradients = [], []
    for row, choice in enumerate(choices):
        inject.activate(base, [] if choice == BASE else [choice or "a"])
        alone.append(base(x[row : row + 1]))
    wanted = torch.cat(alone)
    parameters = [p for name in "abc" for p in target(base).tensors(name).values() if p.requires_grad]
    weight = torch.randn_like(wanted)
    inputs = [*parameters, *([x] if x.requires_grad else [])]
    gradients = torch.autograd.grad((wanted * weight).sum(), inputs)
    inject.activate(base, ["a"])
    shared.current.rows = Rows(adapters=choices)
    got = base(x)
    close(got, wanted)
    for mine, theirs in zip(torch.autograd.grad((got * weight).sum(), inputs), gradients, strict=True):
        close(mine, theirs)


@sites
def test_law_2_stacked_rows(case, kind) -> None:
    """Parts of one size take the path over the pool's arrays, where the method has one."""
    base, shared = adapted(case, kind, "a", "b", "c")
    disturb(base)
    x = sample(kind, rows=6)
    wanted = []
    for row, choice in enumerate("abcabc"):
        inject.activate(base, [choice])
        wanted.append(base(x[row : row + 1]))
    expected = torch.cat(wanted)
    parameters = [p for name in "abc" for p in target(base).tensors(name).values() if p.requires_grad]
    gradients = torch.autograd.grad(expected.square().sum(), parameters)
    shared.current.rows = Rows(adapters=tuple("abcabc"))
    got = base(x)
    close(got, expected)
    for mine, theirs in zip(torch.autograd.grad(got.square().sum(), parameters), gradients, strict=True):
        close(mine, theirs)


@sites
def test_law_3_gradients_reach_the_adapter_and_nothing_else(case, kind) -> None:
    base, _ = adapted(case, kind, "a", "other")
    disturb(base)
    inject.set_requires_grad(base, ["other"], False)
    base(sample(kind)).square().sum().backward()
    wrapper = target(base)
    for key, param in wrapper.wanted("a").items():
        gradient = wrapper.tensors("a")[key].grad
        assert (gradient is not None and gradient.abs().sum() > 0) == param.trainable, key
    assert all(p.grad is None for p in wrapper.tensors("other").values())
    assert all(p.grad is None for p in wrapper.base_layer.parameters())


@sites
def test_law_4_meta_has_the_same_shapes(case, kind) -> None:
    base, _ = adapted(case, kind)
    ghost, _ = adapted(case, kind, device="meta")
    real, meta = target(base).tensors("a"), target(ghost).tensors("a")
    assert {key: p.shape for key, p in real.items()} == {key: p.shape for key, p in meta.items()}
    assert all(p.is_meta for p in meta.values())
    site = target(base).base.site
    for key, param in target(base).wanted("a").items():
        assert len(param.dims) == len(param.shape) == real[key].ndim
        for name, size in zip(param.dims, param.shape, strict=True):
            if name == "out":
                assert size == site.out
            if name == "1":
                assert size == 1


@sites
def test_law_5_merge_and_back(case, kind) -> None:
    base, _ = adapted(case, kind)
    disturb(base)
    x = sample(kind)
    before, stored = base(x), {key: p.clone() for key, p in target(base).base_layer.named_parameters()}
    merge.merge(base)
    close(base(x), before)
    close(target(base).base_layer(x), before)
    merge.unmerge(base)
    for key, p in target(base).base_layer.named_parameters():
        assert torch.equal(p, stored[key])
    close(base(x), before)


@sites
def test_law_5_merge_in_bf16_restores_the_bits(case, kind) -> None:
    base, _ = adapted(case, kind)
    disturb(base)
    base.target.base_layer.to(torch.bfloat16)
    stored = {key: p.clone() for key, p in target(base).base_layer.named_parameters()}
    change, _ = target(base).change(["a"])
    wanted = target(base).base.plus(target(base).base.weight().double(), change).to(torch.bfloat16)
    merge.merge(base)
    # The sum is made in fp32 and rounded once: at most one bf16 step (up to 2^-7 of a number) from the sum made
    # in float64.
    torch.testing.assert_close(target(base).base.weight(), wanted, rtol=2**-7, atol=0)
    merge.unmerge(base)
    for key, p in target(base).base_layer.named_parameters():
        assert torch.equal(p, stored[key])


@cases
def test_law_6_configs_survive_pickle_and_dictionaries(case) -> None:
    fields = {field.name for field in dataclasses.fields(config_class(case.method))}
    config = case.config(**({"target_modules": ["target"]} if "target_modules" in fields else {}))
    assert pickle.loads(pickle.dumps(config)) == config
    assert PeftConfig.from_dict(config.to_dict()) == config
    assert isinstance(config, config_class(case.method.lower()))
    assert config.prefix == prefix_of(case.method)


def refuses(base, names: list[str]) -> bool:
    """Whether these adapters may not be active at once, though what they would do together is defined."""
    try:
        inject.check_together(base, names)
    except AdapterError:
        return True
    return False


@sites
def test_law_9_several_active_adapters(case, kind) -> None:
    base, _ = adapted(case, kind, "a", "b")
    disturb(base)
    wrapper, x = target(base), sample(kind)
    first, second = (wrapper.change([name]) for name in "ab")
    inject.activate(base, ["a", "b"])
    got = base(x)
    close(got, run_with(wrapper, ["a", "b"], x))
    together = wrapper.change(["a", "b"])
    if wrapper.methods["a"].compose == "add":
        close(together[0], first[0] + second[0])
    else:
        chained = wrapper.levels(["a", "b"])[1]
        assert isinstance(chained.under, Adjusted)
        close(chained.under.weight(), wrapper.base.weight() + first[0])
    if refuses(base, ["a", "b"]):
        with pytest.raises(AdapterError):
            merge.merge(base)
        return
    merge.merge(base)
    close(base(x), got)


@sites
def test_law_10_full_size(case, kind) -> None:
    """Counts the (out, in) tensors that autograd keeps for the adapter, beyond the layer's own weight."""
    base, _ = adapted(case, kind, layers=LARGE)
    # So many rows that no activation has as many elements as a weight.
    wrapper, x = target(base), sample(kind, rows=13, width=60)
    # As on a partitioned base, where it matters: elsewhere a tensor may be kept in place of a larger one.
    wrapper.base.is_running = True
    # As in the middle of a model: without it no weight is kept.
    x.requires_grad_(x.is_floating_point())
    size = wrapper.base.site.out * wrapper.base.site.in_
    weight = wrapper.base_layer.weight
    kept = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == size and tensor.is_floating_point() and tensor.data_ptr() != weight.data_ptr():
            kept.add(tensor.data_ptr())
        return tensor

    assert size not in (x.numel(), base(x).numel())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        base(x)
    assert len(kept) == wrapper.methods["a"].full_size


@pytest.mark.parametrize(
    ("case", "kind"), [site for site in SITES if issubclass(config_class(site[0].method), WeightMethod)]
)
def test_added_is_forward_without_the_layer(case, kind) -> None:
    base, _ = adapted(case, kind)
    disturb(base)
    wrapper, x = target(base), sample(kind)
    method = wrapper.methods["a"]
    p = wrapper.given("a")
    close(
        method.forward(p, wrapper.base, x, lambda t: t) - wrapper.base_layer(x),
        method.added(p, wrapper.base, x),
    )
    plain = WeightMethod.added(method, p, wrapper.base, x) if not wrapper.base.site.kernel else None
    if plain is not None:
        close(plain, method.added(p, wrapper.base, x))


def test_configs_are_dataclasses() -> None:
    for name in METHODS:
        assert dataclasses.is_dataclass(config_class(name))


def test_wrapped_layers_are_one_class() -> None:
    for case, kind in SITES[:3]:
        assert type(target(adapted(case, kind)[0])) is Adapted
