"""AdapterOptimizer in one process: torch's own optimizers are the oracle, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from peft_dist.errors import OptimizerError
from peft_dist.optim import AdapterOptimizer, Hyper, _buckets, _Tensor

SHAPES = {"a.weight": (3, 4), "b.weight": (5,), "c.weight": (2, 2, 2), "d.scale": ()}


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()
    }


def give_gradients(params: dict[str, Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in params.values():
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)


def torch_twin(params: dict[str, Parameter], hyper: Hyper) -> torch.optim.Optimizer:
    if hyper.optimizer == "sgd":
        return torch.optim.SGD(params.values(), lr=hyper.learning_rate, weight_decay=hyper.weight_decay)
    return torch.optim.AdamW(
        params.values(),
        lr=hyper.learning_rate,
        betas=hyper.betas,
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        # In half precision torch's two ways differ by a rounding each.
        fused=all(p.dtype != torch.bfloat16 for p in params.values()),
    )


def assert_same(ours: dict[str, Parameter], theirs: dict[str, Parameter]) -> None:
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "hyper",
    [
        Hyper(1e-2),
        Hyper(1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6, max_grad_norm=0.5),
        Hyper(1e-1, optimizer="sgd", weight_decay=0.01, max_grad_norm=100.0),
    ],
)
def test_updates_equal_torchs_to_the_bit(stage: int, dtype: torch.dtype, hyper: Hyper) -> None:
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer = AdapterOptimizer(stage=stage)
    optimizer.add("default", ours, hyper)
    twin = torch_twin(theirs, hyper)
    for step in range(5):
        optimizer.zero_grad()
        give_gradients(ours, seed=step)
        give_gradients(theirs, seed=step)
        optimizer.reduce()
        norm = optimizer.step()["default"]
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), hyper.max_grad_norm or math.inf)
        # bf16: torch rounds each tensor's norm to bf16 (8 bits) before it puts them together.
        assert norm == pytest.approx(float(expected), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
        twin.step()
        if dtype == torch.bfloat16 and hyper.max_grad_norm == 0.5:
            # The clipping factor is fp32 here and bf16 there: one rounding of 2^-8 of an update of 1e-2.
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], rtol=2**-7, atol=1e-3)
        else:
            assert_same(ours, theirs)


def test_learning_rates_are_each_adapters_own() -> None:
    a, b, a_twin, b_twin = parameters(1), parameters(2), parameters(1), parameters(2)
    optimizer = AdapterOptimizer()
    optimizer.add("a", a, Hyper(1e-2))
    optimizer.add("b", b, Hyper(1e-3, optimizer="sgd"))
    twins = [torch_twin(a_twin, Hyper(1e-2)), torch_twin(b_twin, Hyper(1e-3, optimizer="sgd"))]
    for step in range(3):
        if step == 1:
            optimizer.set_learning_rate("a", 5e-3)
            twins[0].param_groups[0]["lr"] = 5e-3
        for params in (a, b, a_twin, b_twin):
            give_gradients(params, seed=step)
        optimizer.step()
        for twin in twins:
            twin.step()
    assert_same(a, a_twin)
    assert_same(b, b_twin)
    assert optimizer.hyper("a").learning_rate == 5e-3
    assert optimizer.names == ("a", "b")


def test_a_loss_scale_is_taken_out_before_clipping() -> None:
    hyper = Hyper(1e-2, max_grad_norm=0.7)
    scaled, plain = parameters(), parameters()
    one, other = AdapterOptimizer(), AdapterOptimizer()
    one.add("x", scaled, hyper)
    other.add("x", plain, hyper)
    give_gradients(scaled, seed=3, scale=1024.0)
    give_gradients(plain, seed=3)
    # A power of two only moves the exponent: every number is the same.
    assert one.step(scale=1024.0) == other.step()
    assert_same(scaled, plain)


def test_a_tensor_without_a_gradient_keeps_value_and_state() -> None:
    ours, theirs = parameters(), parameters()
    optimizer, twin = AdapterOptimizer(), torch_twin(theirs, Hyper(1e-2, weight_decay=0.1))
    optimizer.add("x", ours, Hyper(1e-2, weight_decay=0.1))
    for step in range(4):
        optimizer.zero_grad()
        twin.zero_grad()
        give_gradients(ours, seed=step)
        give_gradients(theirs, seed=step)
        if step % 2:
            ours["b.weight"].grad = theirs["b.weight"].grad = None
        optimizer.reduce()
        optimizer.step()
        twin.step()
    assert_same(ours, theirs)
    assert optimizer.whole_state()["x/b.weight/step"] == 2
    assert optimizer.whole_state()["x/a.weight/step"] == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_adapter_with_a_gradient_that_is_not_finite_is_left_as_it_was(bad: float) -> None:
    good, hit = parameters(1), parameters(2)
    optimizer = AdapterOptimizer()
    optimizer.add("good", good, Hyper(1e-2, max_grad_norm=1.0))
    optimizer.add("hit", hit, Hyper(1e-2, max_grad_norm=1.0))
    give_gradients(good, seed=0)
    give_gradients(hit, seed=0)
    optimizer.step()
    before = {name: p.detach().clone() for name, p in hit.items()}
    state_before = optimizer.whole_state()
    good_before = good["a.weight"].detach().clone()
    hit["c.weight"].grad[0, 0, 0] = bad
    norms = optimizer.step()
    assert not math.isfinite(norms["hit"]) and math.isfinite(norms["good"])
    assert all(torch.equal(hit[name], before[name]) for name in hit)
    state = optimizer.whole_state()
    assert all(torch.equal(state[key], state_before[key]) for key in state if key.startswith("hit/"))
    assert not torch.equal(good["a.weight"], good_before)


def test_an_unused_adapter_has_norm_zero_and_keeps_everything() -> None:
    params = parameters()
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = AdapterOptimizer()
    optimizer.add("x", params, Hyper(1e-2, weight_decay=0.5))
    optimizer.reduce()
    assert optimizer.step() == {"x": 0.0}
    assert all(torch.equal(params[name], before[name]) for name in params)
    assert optimizer.whole_state() == {}


def test_a_loaded_state_goes_on_exactly() -> None:
    def train(optimizer: AdapterOptimizer, params: dict[str, Parameter], steps: range) -> None:
        for step in steps:
            give_gradients(params, seed=step)
            optimizer.step()

    whole = parameters()
    uninterrupted = AdapterOptimizer()
    uninterrupted.add("ns/x", whole, Hyper(1e-2))
    train(uninterrupted, whole, range(3))
    saved = {name: Parameter(p.detach().clone()) for name, p in whole.items()}
    state = uninterrupted.whole_state()
    train(uninterrupted, whole, range(3, 6))

    resumed = AdapterOptimizer(stage=2)
    resumed.add("ns/x", saved, Hyper(1e-2))
    resumed.load_whole_state(state)
    again = resumed.whole_state()
    assert list(again) == list(state) and all(torch.equal(again[key], state[key]) for key in state)
    train(resumed, saved, range(3, 6))
    assert_same(whole, saved)
    assert resumed.state_bytes() == uninterrupted.state_bytes() > 0


def test_removing_frees_the_state_and_leaves_the_other_adapter_alone() -> None:
    a, b, twin = parameters(1), parameters(2), parameters(1)
    optimizer, alone = AdapterOptimizer(), AdapterOptimizer()
    optimizer.add("a", a, Hyper(1e-2))
    optimizer.add("b", b, Hyper(1e-2))
    alone.add("a", twin, Hyper(1e-2))
    for step in range(4):
        for params in (a, b, twin):
            give_gradients(params, seed=step)
        optimizer.step()
        alone.step()
        if step == 1:
            optimizer.remove("b")
    assert_same(a, twin)
    assert optimizer.state_bytes() == alone.state_bytes()
    optimizer.add("b", b, Hyper(1e-3))
    assert optimizer.names == ("a", "b")


def test_buckets_keep_dtypes_apart_and_hold_64_mib_at_most() -> None:
    large = Parameter(torch.empty(17 * 2**20))
    small = [Parameter(torch.empty(2**20)) for _ in range(20)]
    other = Parameter(torch.empty(3, dtype=torch.float64))
    tensors = [_Tensor(str(i), p, 0) for i, p in enumerate([large, *small, other])]
    buckets = list(_buckets(tensors))
    assert sorted(t.name for bucket in buckets for t in bucket) == sorted(t.name for t in tensors)
    assert len(buckets) == 4  # the large one alone, 16 and 4 small ones, the other dtype
    for bucket in buckets:
        assert len({t.parameter.dtype for t in bucket}) == 1
        assert len(bucket) == 1 or sum(t.parameter.nbytes for t in bucket) <= 64 * 2**20


def refusal(call: object, *args: object) -> str:
    with pytest.raises(OptimizerError) as caught:
        call(*args)
    return str(caught.value)


def test_wrong_use_is_refused_in_words() -> None:
    params = parameters()
    optimizer = AdapterOptimizer()
    optimizer.add("x", params, Hyper(1e-2))
    assert refusal(AdapterOptimizer, 4) == "AdapterOptimizer: stage is 4; it is one of 0, 1, 2, 3."
    assert refusal(optimizer.add, "x", parameters(), Hyper(1)) == (
        "AdapterOptimizer.add('x'): the name is taken. Remove that adapter first, or use another name."
    )
    assert refusal(optimizer.add, "y", {"w": params["a.weight"]}, Hyper(1)) == (
        "AdapterOptimizer.add('y'): 'w' is trained under another name already."
    )
    frozen = {"w": Parameter(torch.zeros(2), requires_grad=False)}
    assert refusal(optimizer.add, "y", frozen, Hyper(1)) == (
        "AdapterOptimizer.add('y'): 'w' does not require a gradient; add trainable ones only."
    )
    assert refusal(optimizer.add, "y", {}, Hyper(1)) == (
        "AdapterOptimizer.add('y'): it has no trainable tensor. Is the adapter loaded with is_trainable=True?"
    )
    assert refusal(optimizer.add, "y", parameters(), Hyper(1, optimizer="adam")) == (
        "AdapterOptimizer.add('y'): optimizer is 'adam'; it is one of 'adamw', 'sgd'."
    )
    assert refusal(optimizer.remove, "z") == "AdapterOptimizer: there is no adapter 'z'. There are: x."
    optimizer.reduce()
    assert refusal(optimizer.reduce) == (
        "AdapterOptimizer.reduce: these gradients are sums over the ranks already. "
        "Call step() or zero_grad() in between."
    )


def test_a_state_of_another_optimizer_is_refused_and_changes_nothing() -> None:
    params = parameters()
    optimizer = AdapterOptimizer()
    optimizer.add("x", params, Hyper(1e-2))
    give_gradients(params, seed=0)
    optimizer.step()
    state = optimizer.whole_state()
    assert refusal(optimizer.load_whole_state, {"y/a.weight/step": torch.tensor(1.0)}) == (
        "AdapterOptimizer.load_whole_state: 'y/a.weight/step' names no trained tensor; adapters here: x. "
        "Add the same adapters first."
    )
    assert refusal(optimizer.load_whole_state, {"x/a.weight/exp_avg": torch.zeros(2)}) == (
        "AdapterOptimizer.load_whole_state: 'x/a.weight/exp_avg' has shape (2,), the tensor has (3, 4)."
    )
    after = optimizer.whole_state()
    assert all(torch.equal(state[key], after[key]) for key in state)
