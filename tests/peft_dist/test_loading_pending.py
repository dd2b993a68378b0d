"""Tensors that are not read yet: any part of any conversion of them is what torch gives on the whole."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_dist.errors import BaseModelError
from peft_dist.loading import pending
from peft_dist.loading.pending import InMemory, Pending
from peft_dist.loading.stored import Files


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So small that every read is made of several."""
    monkeypatch.setattr(pending, "CHUNK_BYTES", 64)
    yield


def check(given: object, expected: Tensor) -> None:
    assert isinstance(given, Pending) and tuple(given.shape) == tuple(expected.shape)
    assert given.dtype == expected.dtype and torch.equal(given.whole(), expected)
    pick, flat = random.Random(0), expected.flatten()
    for _ in range(12):
        start = pick.randrange(flat.numel() + 1)
        stop = pick.randrange(start, flat.numel() + 1)
        assert torch.equal(given.part(start, stop), flat[start:stop])


def lazy(tensors: list[Tensor]) -> list[Pending]:
    return [InMemory(tensor) for tensor in tensors]


def test_experts_are_stacked_and_joined_without_being_read() -> None:
    gates, ups = ([torch.randn(3, 5).bfloat16() for _ in range(4)] for _ in range(2))
    gate, up = torch.stack(lazy(gates), dim=0), torch.stack(lazy(ups), dim=0)  # type: ignore[arg-type]
    check(torch.cat([gate, up], dim=1), torch.cat([torch.stack(gates), torch.stack(ups)], dim=1))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_projections_are_split_joined_and_turned(dim: int) -> None:
    x = torch.randn(6, 4, 10)
    held = InMemory(x)
    for given, expected in zip(torch.chunk(held, 2, dim=dim), torch.chunk(x, 2, dim=dim), strict=True):  # type: ignore[call-overload]
        check(given, expected.contiguous())
    for given, expected in zip(held.unbind(dim), x.unbind(dim), strict=True):
        check(given, expected.contiguous())
    check(torch.stack([held, held], dim=dim), torch.stack([x, x], dim=dim))  # type: ignore[list-item]
    for other in range(3):
        check(torch.transpose(held, dim, other), x.transpose(dim, other).contiguous())  # type: ignore[call-overload]


def test_what_is_not_known_is_done_on_the_values() -> None:
    x = torch.randn(6, 10)
    assert torch.equal(torch.exp(InMemory(x)), torch.exp(x))  # type: ignore[arg-type]
    assert torch.equal(InMemory(x)[2:4], x[2:4]) and InMemory(x).mean() == x.mean()
    rope = InMemory(x).reshape(2, 3, 10).transpose(0, 1).reshape(6, -1)
    check(rope, x.view(2, 3, 10).transpose(0, 1).reshape(6, -1))
    # Through bf16 and back: each cast counts.
    check(InMemory(x).to(torch.bfloat16).to(dtype=torch.float32), x.bfloat16().float())


def test_a_part_of_a_stored_tensor_costs_that_part(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(50, 8), "b": torch.arange(30).view(5, 6)}
    save_file(tensors, tmp_path / "w.safetensors")
    with Files([tmp_path / "w.safetensors"]) as files:
        check(files.tensors["a"], tensors["a"])
        check(files.tensors["b"], tensors["b"])
        before = files.bytes_read
        assert torch.equal(files.tensors["a"].part(16, 40), tensors["a"].flatten()[16:40])
        assert files.bytes_read - before == 24 * 4
        half = files.tensors["a"].to(torch.bfloat16)
        assert torch.equal(half.part(3, 99), tensors["a"].flatten()[3:99].bfloat16())


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.randn(50, 8)}, path)
    with Files([path]) as files:
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(BaseModelError, match=r"w\.safetensors ends at byte \d+, within tensor 'a'"):
            files.tensors["a"].whole()
