"""Fused paths: equal to what they stand for, taken only where nobody would notice, and no second derivative."""

from __future__ import annotations

import copy
import importlib

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import peft_dist
from peft_dist import fused, inject
from peft_dist.base_layer import door
from peft_dist.catalog import config_class

IN, OUT, R = 24, 36, 4
W, B_ = torch.randn(OUT, IN, dtype=torch.float64), torch.randn(OUT, dtype=torch.float64)
W2 = torch.randn(IN, IN, dtype=torch.float64)
P, Q = torch.randn(R, IN, dtype=torch.float64), torch.randn(OUT, R, dtype=torch.float64)
EYE = torch.eye(4, dtype=torch.float64)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def dora(b, x, A, B, m):
    V = W + 0.5 * B @ A
    y = x @ V.T * (m / V.detach().norm(dim=1))
    return y if b is None else y + b


def turned_by_series(x, parts, folds=False):
    turns = fused.rotations([Q for *_, Q in parts])
    return fused.turned(x, [(W, b, *turn) for (W, b, _), turn in zip(parts, turns, strict=True)], folds)


def by_series(x, Q):
    K = fused.skew(Q)
    return x @ torch.block_diag(*(EYE + 2 * K + 2 * K @ K + 2 * K @ K @ K + K @ K @ K @ K))


def head(b):
    return None if b is None else b[:9]


# name -> (the node, what it stands for, the shapes of its tensors beside x)
NODES = {
    "low_rank": (
        lambda b, x, A, B: fused.low_rank(x, x, [(W, b, A, B, 0.5)])[0],
        lambda b, x, A, B: F.linear(x, W, b) + 0.5 * (x @ A.T) @ B.T,
        ((R, IN), (OUT, R)),
    ),
    "low_rank of another input": (
        lambda b, x, e, A, B: fused.low_rank(x, e, [(W, b, A, B, 0.5)])[0],
        lambda b, x, e, A, B: F.linear(x, W, b) + 0.5 * (e @ A.T) @ B.T,
        ((2, 5, IN), (R, IN), (OUT, R)),
    ),
    "low_rank of two layers": (
        lambda b, x, A, B, C, D: torch.cat(
            fused.low_rank(x, x, [(W, b, A, B, 0.5), (W2, None, C, D, 2.0)]), -1
        ),
        lambda b, x, A, B, C, D: torch.cat(
            [F.linear(x, W, b) + 0.5 * (x @ A.T) @ B.T, x @ W2.T + 2 * (x @ C.T) @ D.T], -1
        ),
        ((R, IN), (OUT, R), (2 * R, IN), (IN, 2 * R)),
    ),
    "projected": (
        lambda b, x, outer, inner: fused.projected(x, x, W, b, P, Q, outer, inner),
        lambda b, x, outer, inner: F.linear(x, W, b) + outer * ((inner * (x @ P.T)) @ Q.T),
        ((OUT,), (R,)),
    ),
    "projected of another input": (
        lambda b, x, e, outer, inner: fused.projected(x, e, W, b, P, Q, outer, inner),
        lambda b, x, e, outer, inner: F.linear(x, W, b) + outer * ((inner * (e @ P.T)) @ Q.T),
        ((2, 5, IN), (OUT,), (R,)),
    ),
    "stretched": (
        lambda b, x, A, B, m: fused.stretched(x, W, b, A, B, m, 0.5),
        dora,
        ((R, IN), (OUT, R), (OUT,)),
    ),
    "reflected": (
        lambda b, x, U, V: fused.reflected(x, W, b, U, V),
        lambda b, x, U, V: F.linear(x - (x @ V.T) @ U.T, W, b),
        ((IN, R), (R, IN)),
    ),
    "pooled": (
        lambda b, x, D: fused.pooled(x, W, b, D),
        lambda b, x, D: F.linear(x, W, b) + x.unflatten(-1, (-1, 3)).sum(-2) @ D,
        ((3, OUT),),
    ),
    "scaled_input": (
        lambda b, x, s: fused.scaled_input(x, W, b, s),
        lambda b, x, s: F.linear(x * s, W, b),
        ((IN,),),
    ),
    "scaled_input of a scale that is a row": (
        lambda b, x, s: fused.scaled_input(x, W, b, s),
        lambda b, x, s: F.linear(x * s.flatten(), W, b),
        ((1, IN),),
    ),
    "scaled_outputs": (
        lambda b, x, s, t: torch.cat(fused.scaled_outputs(x, [(W, b, s), (W2, None, t)]), -1),
        lambda b, x, s, t: torch.cat([F.linear(x, W, b) * s, x @ W2.T * t.flatten()], -1),
        ((OUT,), (IN, 1)),
    ),
    "changed": (
        lambda b, x, D: fused.changed(x, W, b, D),
        lambda b, x, D: F.linear(x, W + D, b),
        ((OUT, IN),),
    ),
    "changed_by_kronecker": (
        lambda b, x, one, two: fused.changed_by_kronecker(x, W, b, one, two),
        lambda b, x, one, two: F.linear(x, W + torch.kron(one, two), b),
        ((4, 3), (9, 8)),
    ),
    "turned": (
        lambda b, x, R: fused.turned(x, [(W, b, R, None)])[0],
        lambda b, x, R: F.linear(x @ torch.block_diag(*R), W, b),
        ((6, 4, 4),),
    ),
    "turned_by_series": (
        lambda b, x, Q: turned_by_series(x, [(W, b, Q)])[0],
        lambda b, x, Q: F.linear(by_series(x, Q), W, b),
        ((6, 6),),
    ),
    "turned_by_series of two layers": (
        lambda b, x, Q, P: torch.cat(turned_by_series(x, [(W, b, Q), (W2, None, P)]), -1),
        lambda b, x, Q, P: torch.cat([F.linear(by_series(x, Q), W, b), by_series(x, P) @ W2.T], -1),
        ((6, 6), (6, 6)),
    ),
    "turned_by_series of two layers, folded": (
        lambda b, x, Q, P: torch.cat(
            turned_by_series(x, [(W[:9], head(b), Q / 50), (W2[:4], None, P / 50)], folds=True), -1
        ),
        lambda b, x, Q, P: torch.cat(
            [F.linear(by_series(x, Q / 50), W[:9], head(b)), by_series(x, P / 50) @ W2[:4].T], -1
        ),
        ((6, 6), (6, 6)),
    ),
    "hadamard": (
        lambda b, x, *p: F.linear(x, fused.hadamard(*p, 0.5), b),
        lambda b, x, A1, B1, A2, B2: F.linear(x, 0.5 * (A1 @ B1) * (A2 @ B2), b),
        ((OUT, R), (R, IN), (OUT, R), (R, IN)),
    ),
}


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_node_is_what_it_stands_for(name, has_bias):
    """Value and every gradient, also where a part of the gradients alone is asked for."""
    node, plain, shapes = NODES[name]
    b = B_ if has_bias else None
    leaves = [leaf(2, 5, IN), *(leaf(*shape) for shape in shapes)]
    y, wanted = node(b, *leaves), plain(b, *leaves)
    # Chains of products in float64, of numbers up to some thousands: rounding reaches 1e-12 of them.
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    g = torch.randn_like(y)
    whole = torch.autograd.grad(wanted, leaves, g)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, g), whole, rtol=1e-10, atol=1e-10)
    for i, one in enumerate(leaves):
        alone = [each if each is one else each.detach() for each in leaves]
        (given,) = torch.autograd.grad(node(b, *alone), [one], g)
        torch.testing.assert_close(given, whole[i], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NODES)
def test_a_node_is_not_differentiated_twice(name):
    node, _, shapes = NODES[name]
    leaves = [leaf(2, 5, IN), *(leaf(*shape) for shape in shapes)]
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice: create_graph=True"):
        torch.autograd.grad(node(None, *leaves).sum(), leaves, create_graph=True)


SIZES = (1e-4, 1e-3, 3e-3, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 1.0)


def error_of_folding(dtype: torch.dtype) -> dict[float, float | None]:
    """Size of the entries -> how far the folded node's gradient of them is from float64's by definition, as a
    share of it; None where it does not fold."""
    torch.manual_seed(0)
    x, unit, g = torch.randn(40, IN), torch.randn(6, 6), torch.randn(40, OUT)
    errors: dict[float, float | None] = {}
    for size in SIZES:
        exact = (size * unit).to(dtype).double().requires_grad_(True)
        (wanted,) = torch.autograd.grad(F.linear(by_series(x.double(), exact), W), exact, g.double())
        own = exact.detach().to(dtype).requires_grad_(True)
        (y,) = turned_by_series(x.to(dtype), [(W.to(dtype), None, own)], folds=True)
        (given,) = torch.autograd.grad(y, own, g.to(dtype))
        error = float((given.double() - wanted).norm() / wanted.norm())
        assert error < 30 * torch.finfo(dtype).eps
        errors[size] = error if "Folded" in type(y.grad_fn).__name__ else None
    return errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_is_turned_as_long_as_the_gradient_is_right_to_rounding(dtype, monkeypatch):
    is_folded = [error is not None for error in error_of_folding(dtype).values()]
    # Small turns are, large ones are not, and where one ends the other begins.
    assert is_folded[0]
    assert not is_folded[-1]
    assert is_folded == sorted(is_folded, reverse=True)
    # Two terms whatever the size would be wrong.
    series = importlib.import_module("peft_dist.fused.turned")._Series
    monkeypatch.setattr(series, "transposed_inverse", lambda self, R: R + 2 * self.S @ self.S @ R)
    with pytest.raises(AssertionError):
        error_of_folding(dtype)


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


class Own(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def hooked(register: str) -> nn.Module:
    layer = frozen(nn.Linear(6, 4))
    getattr(layer, register)(lambda *args: None)
    return layer


def patched() -> nn.Module:
    layer = frozen(nn.Linear(6, 4))
    layer.forward = lambda x: F.linear(x, layer.weight)
    return layer


@pytest.mark.parametrize(
    "layer", [frozen(nn.Linear(6, 4)), frozen(nn.Linear(6, 4, bias=False)), frozen(Conv1D(4, 6))]
)
def test_a_plain_layer_is_given_as_it_is(layer):
    x = torch.randn(2, 6)
    W, b = fused.plain(door(layer, "layer"), x)
    torch.testing.assert_close(F.linear(x, W, b), layer(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        frozen(Own(6, 4)),
        hooked("register_forward_hook"),
        hooked("register_forward_pre_hook"),
        hooked("register_full_backward_hook"),
        patched(),
        frozen(nn.Linear(6, 4).double()),
    ],
    ids=["trained", "a class of its own", "hook", "pre-hook", "backward hook", "patched", "another dtype"],
)
def test_a_layer_that_must_be_called_is_not_passed_by(layer):
    assert fused.plain(door(layer, "layer"), torch.randn(2, 6)) is None


def test_nor_is_one_under_autocast_a_transform_or_whose_adapter_has_another_dtype():
    base, x = door(frozen(nn.Linear(6, 4)), "layer"), torch.randn(2, 6)
    assert fused.plain(base, x) is not None
    assert fused.plain(base, x, torch.zeros(1).double()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.plain(base, x) is None
    seen = []
    torch.func.vmap(lambda row: seen.append(fused.plain(base, row)) or row)(x[None])
    assert seen == [None]
    base.layer.weight.ds_id = 1
    assert fused.plain(base, x) is None


def test_half_precision_is_not_summed_into_the_weight():
    base = door(frozen(nn.Linear(6, 4).bfloat16()), "layer")
    x = torch.randn(2, 6, dtype=torch.bfloat16)
    assert fused.plain(base, x) is not None
    assert fused.exactly(base, x) is None


CONFIGS = {
    "LORA": {"r": 2, "init_lora_weights": False},
    "DORA": {"r": 2, "init_lora_weights": False, "use_dora": True},
    "IA3": {"feedforward_modules": ["two"], "init_ia3_weights": False},
    "LOHA": {"r": 2, "init_weights": False},
    "LOKR": {"r": 2, "init_weights": False},
    "FOURIERFT": {"n_frequency": 5},
    "OFT": {"r": 0, "oft_block_size": 2, "init_weights": False},
    "HRA": {"r": 2, "init_weights": False},
}


@pytest.mark.parametrize("method", CONFIGS)
def test_hooks_and_checkpointing_change_nothing(method):
    """A layer with a hook takes the general path, and gives the same values and gradients; a hook is called."""

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.two(self.one(x).tanh())

    torch.manual_seed(0)
    base = Base().double()
    values = {**CONFIGS[method], "target_modules": ["one", "two"]}
    config = config_class("LORA" if method == "DORA" else method)(**values)
    inject.inject(base, config, "a", inject.Adapters())
    inject.activate(base, ["a"])
    hooked, calls = copy.deepcopy(base), []
    for name in ("one", "two"):
        getattr(hooked, name).base_layer.register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    found = []
    for model in (base, hooked):
        own = x.clone().requires_grad_(True)
        y = checkpoint(model, own, use_reentrant=False)
        y.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((y, own.grad, grads))
    # Two layers, which run again for the backward: as far as it asks for them.
    assert len(calls) > 2
    assert found[0][2]
    torch.testing.assert_close(found[0], found[1])


class Residual(nn.Module):
    """Changes in place what its first layer takes or gives, or both."""

    def __init__(self, changes: str) -> None:
        super().__init__()
        self.first, self.second, self.changes = nn.Linear(32, 32), nn.Linear(32, 16), changes

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x).clone()
        y = self.first(x)
        if "given" in self.changes:
            F.leaky_relu_(y, 0.3)
        if "taken" in self.changes:
            x += 1
        return self.second(x + y)


@pytest.mark.parametrize("changes", ["given", "taken", "nothing"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_ia3s_gradient_is_right_whatever_changes_in_place(changes, checkpointed):
    torch.manual_seed(0)
    base, x, gradients = Residual(changes), torch.randn(6, 32), []
    for library in (peft, peft_dist):
        config = library.IA3Config(target_modules=["first", "second"], feedforward_modules=[])
        model = library.get_peft_model(copy.deepcopy(base), config)
        scales = [p for name, p in model.named_parameters() if "ia3_l" in name]
        for scale in scales:
            scale.data.copy_(torch.linspace(0.5, 1.5, scale.numel()).view_as(scale))
            scale.data[3] = 0 if changes == "nothing" else 1
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        y.square().sum().backward()
        gradients.append([scale.grad for scale in scales])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_ia3_runs_in_inference_mode_and_on_what_it_made():
    config = peft_dist.IA3Config(target_modules=["first", "second"], feedforward_modules=[])
    model = peft_dist.get_peft_model(Residual("nothing"), config)
    x = torch.randn(6, 32)
    with torch.inference_mode():
        given, made = model(x), x.clone()
    torch.testing.assert_close(given, model(x))
    torch.testing.assert_close(given, model(made))


def test_where_nothing_is_left_for_ia3s_gradient_it_says_so():
    config = peft_dist.IA3Config(target_modules=["first"], feedforward_modules=[])
    y = peft_dist.get_peft_model(Residual("given and taken"), config)(torch.randn(6, 32))
    with pytest.raises(RuntimeError, match="Change a copy of what it takes"):
        y.sum().backward()
