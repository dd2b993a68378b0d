"""The compiled loops of training steps against the formulas, in double precision."""

import pytest
import torch
from torch import nn

import peft_dist
from peft_dist.compiled import block_loop, lane_loop, scaled_loop
from peft_dist.fused.scaled import scaled_outputs
from peft_dist.fused.turned import turned


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(*shapes):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("rows", [1, 8, 35])
@pytest.mark.parametrize(("blocks", "b"), [(3, 16), (2, 32), (2, 48), (1, 256)])
def test_blocks_are_the_dense_products(rows, blocks, b):
    x, g, R, to = drawn((rows, blocks * b), (rows, blocks * b), (blocks, b, b), (rows, blocks * b))
    assert block_loop.suits(b, x, R)
    dense, was = torch.block_diag(*R.double()), to.double()
    block_loop.turn(x, R.mT.contiguous().mT, to)
    torch.testing.assert_close(to.double(), x.double() @ dense, rtol=1e-5, atol=1e-4)
    block_loop.turn(x, R, to.copy_(was), adds=True)
    torch.testing.assert_close(to.double(), was + x.double() @ dense, rtol=1e-5, atol=1e-4)
    want = (x.double().T @ g.double()).view(blocks, b, blocks, b).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    torch.testing.assert_close(block_loop.cross(x, g, b).double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 8, 21])
@pytest.mark.parametrize("columns", [5, 16, 70])
def test_a_scale_and_its_gradient_come_from_one_pass(rows, columns):
    g, y, scale = drawn((rows, columns), (rows, columns), (columns,))
    assert scaled_loop.suits(g, y, scale)
    given = torch.empty_like(g)
    sums = scaled_loop.scale(g, y, scale, given)
    torch.testing.assert_close(sums.double(), (g.double() * y.double()).sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(given, g * scale)
    assert torch.equal(scaled_loop.scale(g, y, scale, g), sums)
    assert torch.equal(g, given), "in place as well"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("rank", [4, 8, 16, 20])
@pytest.mark.parametrize(("in_", "out"), [(64, 32), (70, 33), (7, 5)])
def test_rows_of_a_pool_are_the_dense_formula(dtype, tolerance, rank, in_, out):
    lanes, weights, length = (2, 0, 1, 0), (0.5, 1.0, 3.0, -2.0), 7
    A, B, x, y = (
        t.mul(0.3).to(dtype)
        for t in drawn((3, rank, in_), (3, out, rank), (4, length, in_), (4, length, out))
    )
    assert lane_loop.takes(A, B, x)
    want = y.double()
    for row, (lane, weight) in enumerate(zip(lanes, weights, strict=True)):
        want[row] += weight * x[row].double() @ A[lane].double().mT @ B[lane].double().mT
    served = lane_loop.served_by_row(lanes, weights, 4 * length)
    lane_loop.add(A, B, (in_, out, rank), served, x, y, across=True)
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("threads", [1, 2])
def test_nodes_give_the_same_with_loops_and_without(threads):
    torch.set_num_threads(threads)
    x, W, R, scale, g = drawn((3, 5, 32), (16, 32), (2, 16, 16), (16,), (3, 5, 16))
    assert block_loop.suits(16, x) is scaled_loop.suits(x) is (threads == 1)
    cases = (
        (
            lambda x, R: turned(x, [(W, None, R, None)])[0],
            lambda x, R: x @ torch.block_diag(*R) @ W.double().T,
            R,
        ),
        (lambda x, s: scaled_outputs(x, [(W, None, s)])[0], lambda x, s: x @ W.double().T * s, scale),
    )
    for node, formula, tensor in cases:
        leaves = [t.clone().requires_grad_(True) for t in (x, tensor)]
        exact = [t.double().requires_grad_(True) for t in (x, tensor)]
        node(*leaves).backward(g)
        formula(*exact).backward(g.double())
        for leaf, want in zip(leaves, exact, strict=True):
            torch.testing.assert_close(leaf.grad.double(), want.grad, rtol=1e-4, atol=1e-4)


def test_rows_that_name_adapters_go_through_the_loop_and_each_gets_its_own(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 12))
    names = ["one", "two", "three"]
    for name, alpha in zip(names, (1, 8, 16), strict=True):
        config = peft_dist.LoraConfig(
            r=8, lora_alpha=alpha, target_modules=["0", "2"], init_lora_weights=False
        )
        if name == "one":
            model = peft_dist.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    (x,) = drawn((6, 5, 24))
    asked = ["two", "one", "two", "three", "three", "one"]
    want = torch.empty(6, 5, 12)
    for row, name in enumerate(asked):
        model.set_adapter(name)
        want[row] = model(x[row]).detach()
    ran = []
    add = lane_loop.add
    monkeypatch.setattr(lane_loop, "add", lambda *given, **how: (ran.append(how), add(*given, **how)))
    with torch.no_grad():
        given = model(x, adapter_names=asked)
    assert ran == [{"across": True}] * 2
    torch.testing.assert_close(given, want, rtol=1e-5, atol=1e-5)
