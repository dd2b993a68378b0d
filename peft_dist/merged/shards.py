"""The files of a checkpoint: which tensor lies where, headers before data, each tensor written in its own place.

safetensors: 8 bytes with the length of a JSON header, the header (name -> dtype, shape, place), then the data.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_dist.loading.stored import DTYPES
from peft_dist.loading.weight_files import SINGLE

PIECE_BYTES = 16 << 20
"""How much of a tensor is copied, cast or added at a time."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its name and its tensors in order."""

    name: str
    entries: tuple[Entry, ...]

    def header(self) -> bytes:
        """What stands before the data, its length first."""
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for entry in self.entries:
            end = begin + entry.num_bytes
            table[entry.key] = {
                "dtype": _NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [begin, end],
            }
            begin = end
        text = json.dumps(table, separators=(",", ":")).encode()
        # Data begins at a multiple of 8, as in files that safetensors writes.
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def split(entries: Sequence[Entry], max_bytes: int) -> list[Shard]:
    """The files for tensors in their order: as few as fit, a tensor that is larger alone in its own."""
    files: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if files[-1] and held + entry.num_bytes > max_bytes:
            files.append([])
            held = 0
        files[-1].append(entry)
        held += entry.num_bytes
    if len(files) == 1:
        return [Shard(SINGLE, tuple(files[0]))]
    return [
        Shard(f"model-{number:05}-of-{len(files):05}.safetensors", tuple(each))
        for number, each in enumerate(files, 1)
    ]


def index_of(shards: Sequence[Shard]) -> str | None:
    """The text of the index; None where there is one file, which needs none."""
    if len(shards) == 1:
        return None
    every = [entry for shard in shards for entry in shard.entries]
    floating = [entry for entry in every if entry.dtype.is_floating_point]
    facts = {
        "total_parameters": sum(torch.Size(entry.shape).numel() for entry in floating),
        "total_size": sum(entry.num_bytes for entry in every),
    }
    places = {entry.key: shard.name for shard in shards for entry in shard.entries}
    return json.dumps({"metadata": facts, "weight_map": places}, indent=2, sort_keys=True) + "\n"


class Shards:
    """The files of a checkpoint in a folder, open for writing: any tensor at any time, by any process.

    Args:
        create: write the headers, and make each file as long as it will be.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], *, create: bool) -> None:
        self._places: dict[str, tuple[int, int, Entry]] = {}
        self._open: list[int] = []
        for shard in shards:
            header = shard.header()
            flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
            number = os.open(folder / shard.name, flags, 0o666)
            self._open.append(number)
            begin = len(header)
            for entry in shard.entries:
                self._places[entry.key] = number, begin, entry
                begin += entry.num_bytes
            if create:
                _write(number, header, 0)
                os.ftruncate(number, begin)

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._open:
            os.close(number)

    def write(self, key: str, pieces: Iterable[Tensor]) -> None:
        """Writes a tensor: its pieces in the order of its elements, of its dtype.

        Raises:
            OSError: the disk is full, or the file is gone.
        """
        number, place, entry = self._places[key]
        end = place + entry.num_bytes
        for piece in pieces:
            assert piece.dtype == entry.dtype, (key, piece.dtype, entry.dtype)
            for part in flat_parts(piece):
                data = part.cpu().contiguous().view(torch.uint8).numpy()
                _write(number, data, place)
                place += data.nbytes
        assert place == end, (key, place, end)


def flat_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The elements of a tensor in their order, flat, at most `PIECE_BYTES` at a time: no copy of all of it."""
    step = max(1, PIECE_BYTES // max(1, tensor.dtype.itemsize))
    if tensor.is_contiguous() or tensor.numel() <= step or tensor.ndim < 2:
        yield from tensor.reshape(-1).split(step)
        return
    rows = max(1, step // max(1, tensor[0].numel()))
    for some in tensor.split(rows):
        yield from some.reshape(-1).split(step)


def _write(number: int, data: Any, place: int) -> None:
    left = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
    while len(left):
        done = os.pwrite(number, left, place)
        left, place = left[done:], place + done
