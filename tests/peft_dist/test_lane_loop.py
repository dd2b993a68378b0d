"""The compiled loop of lanes against the dense formula, and what stands in for it where nothing can be compiled."""

import logging
import subprocess
import sys

import pytest
import torch

from peft_dist.compiled import lane_loop, library

SPANS = [(0, 1), (1, 8), (8, 8), (8, 10), (10, 15)]
SERVED = [((2, 0.5),), ((0, 1.0),), ((1, 3.0),), (), ((1, -2.0), (0, 0.25))]


def drawn(dtype, in_, out, rank=4, positions=15):
    generator = torch.Generator().manual_seed(3)
    shapes = (3, rank, in_), (3, rank, out), (positions, in_), (positions, out)
    return [torch.randn(shape, generator=generator).mul(0.3).to(dtype) for shape in shapes]


def sizes(A, B):
    return A.shape[2], B.shape[2], A.shape[1]


def dense(A, B, x, y, spans=SPANS, served=SERVED):
    A, B, x, y = (t.double() for t in (A, B, x, y))
    for (start, stop), lanes in zip(spans, served, strict=True):
        for lane, weight in lanes:
            y[start:stop] += weight * x[start:stop] @ A[lane].mT @ B[lane]
    return y


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize(("in_", "out"), [(64, 32), (70, 33), (7, 5), (16, 100)])
@pytest.mark.parametrize("rank", [4, 16])
def test_it_is_the_dense_formula(dtype, tolerance, in_, out, rank):
    A, B, x, y = drawn(dtype, in_, out, rank)
    want, was = dense(A, B, x, y), y.clone()
    lane_loop.add(A, B, sizes(A, B), lane_loop.Served(SPANS, SERVED), x, y)
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(y[8:10], was[8:10])  # nobody serves these
    assert not torch.equal(y[0], was[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_position_has_the_same_bits_beside_others_and_alone(dtype):
    A, B, x, y = drawn(dtype, 70, 33)
    together, alone = y.clone(), y.clone()
    lane_loop.add(A, B, sizes(A, B), lane_loop.Served(SPANS, SERVED), x, together)
    for (start, stop), lanes in zip(SPANS, SERVED, strict=True):
        for at in range(start, stop):
            one = alone[at : at + 1]
            lane_loop.add(A, B, sizes(A, B), lane_loop.Served([(0, 1)], [lanes]), x[at : at + 1], one)
    assert torch.equal(together, alone)


def test_what_is_no_number_stays_none():
    A, B, x, y = drawn(torch.bfloat16, 16, 20)
    y[3, 4], y[4, 5], x[12] = float("nan"), float("inf"), float("nan")
    lane_loop.add(A, B, sizes(A, B), lane_loop.Served(SPANS, SERVED), x, y)
    assert y[3, 4].isnan() and y[4, 5].isinf() and y[12].isnan().all()
    assert y.isnan().sum() == 21


def test_without_a_compiler_others_do_it(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PATH", "/nowhere")
    with caplog.at_level(logging.WARNING):
        assert library.library.__wrapped__("lane_loop") is None
    assert "install g++ or clang++" in caplog.text


def test_what_the_compiler_says_is_told_and_nothing_is_left(monkeypatch, tmp_path, caplog):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int add( {")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    with caplog.at_level(logging.WARNING):
        assert library.library.__wrapped__("broken") is None
    assert "error" in caplog.text
    assert list((tmp_path / "cache" / "peft_dist").iterdir()) == []


def test_it_is_compiled_once_for_a_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library.library.__wrapped__("lane_loop") is not None
    (made,) = (tmp_path / "peft_dist").iterdir()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
    assert library.library.__wrapped__("lane_loop") is not None
    monkeypatch.setattr(library, "_processor", lambda: "another")
    with pytest.raises(pytest.fail.Exception):
        library.library.__wrapped__("lane_loop")
    assert [made] == list((tmp_path / "peft_dist").iterdir())


def test_it_is_left_out_on_request(tmp_path):
    code = (
        "from peft_dist.compiled import lane_loop; import torch;"
        "print(lane_loop.suits(16, torch.float32, torch.device('cpu')))"
    )
    for value, want in (("0", "False"), ("1", "True")):
        env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PEFT_DIST_COMPILED": value}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [want]
