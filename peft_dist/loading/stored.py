"""Tensors as safetensors files store them, read by positioned reads: a part of a tensor costs that part.

Nothing is mapped, so what is read is counted where it is kept, and several processes share the system's cache.
Format: an 8-byte length, a JSON header with dtype, shape and offsets, then the values row by row.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_dist.errors import BaseModelError
from peft_dist.loading.pending import CHUNK_BYTES, Pending

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Stored(Pending):
    """One tensor of a file. `bytes_read` of its file counts what was read."""

    def __init__(self, file: File, key: str, dtype: torch.dtype, shape: Sequence[int], offset: int) -> None:
        super().__init__(shape, dtype)
        self.file, self.key, self.offset = file, key, offset

    def _fill(self, start: int, out: Tensor) -> None:
        size = self.dtype.itemsize
        self.file.read(self.offset + start * size, out, self.key)


class File:
    """A safetensors file, open for reading.

    Attributes:
        tensors: what it holds, by key. bytes_read: how many bytes of values were read so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.tensors = self._listed()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file; nothing of it can be read afterwards."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, offset: int, out: Tensor, key: str) -> None:
        """Fills `out` (contiguous, on the CPU) with the bytes that begin at `offset` of the file's values.

        Raises:
            BaseModelError: the file ends before, or the storage fails.
        """
        into = memoryview(out.view(torch.uint8).reshape(-1).numpy())  # type: ignore[arg-type]
        position = self._start + offset
        while into:
            try:
                count = os.preadv(self._descriptor, [into[: 1 << 30]], position)
            except OSError as error:
                raise BaseModelError(
                    f"base model: {self.path} cannot be read at byte {position} (tensor {key!r}): {error}. "
                    "Try again, or copy it to a disk that works."
                ) from error
            if count == 0:
                raise BaseModelError(
                    f"base model: {self.path} ends at byte {position}, within tensor {key!r}. It was cut short: "
                    "copy it again."
                )
            into = into[count:]
            position += count
            self.bytes_read += count

    def _listed(self) -> dict[str, Stored]:
        (length,) = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))
        header = json.loads(os.pread(self._descriptor, length, 8))
        self._start = 8 + length
        header.pop("__metadata__", None)
        return {key: self._one(key, entry) for key, entry in header.items()}

    def _one(self, key: str, entry: Mapping[str, Any]) -> Stored:
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise BaseModelError(
                f"base model: {self.path}: tensor {key!r} is stored as {entry['dtype']!r}, which torch has no dtype "
                f"for. It is one of {', '.join(DTYPES)}."
            )
        start, end = entry["data_offsets"]
        stored = Stored(self, key, dtype, entry["shape"], start)
        if end - start != stored.numel() * dtype.itemsize:
            raise BaseModelError(
                f"base model: {self.path}: tensor {key!r} has {end - start} bytes, its shape {entry['shape']} and "
                f"dtype {entry['dtype']} say {stored.numel() * dtype.itemsize}. Copy the file again."
            )
        return stored


class Files:
    """All weight files of a base, as one mapping from key to tensor.

    Use as a context: the files are closed when it ends.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.opened: list[File] = []
        self.tensors: dict[str, Stored] = {}
        try:
            for path in paths:
                file = File(path)
                self.opened.append(file)
                self.tensors.update(file.tensors)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes every file."""
        for file in self.opened:
            file.close()

    @property
    def bytes_read(self) -> int:
        """How many bytes of values were read so far."""
        return sum(file.bytes_read for file in self.opened)

    def floating_dtype(self) -> torch.dtype | None:
        """The dtype of the first tensor of full or half precision, by key; None where there is none."""
        floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        return next(
            (stored.dtype for _, stored in sorted(self.tensors.items()) if stored.dtype in floats), None
        )


def equal(first: Pending, second: Pending, rank: int = 0, world: int = 1) -> bool:
    """Whether two tensors are alike in shape and values, of which each of `world` ranks compares a share."""
    if first.shape != second.shape:
        return False
    share = -(-first.numel() // world)
    start, stop = rank * share, min((rank + 1) * share, first.numel())
    return all(
        torch.equal(first.part(low, high), second.part(low, high))
        for low, high in chunks(start, stop, first.dtype.itemsize)
    )


def chunks(start: int, stop: int, itemsize: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """[start, stop) cut into pieces of at most CHUNK_BYTES, each but the last a multiple of `step` long."""
    most = max(CHUNK_BYTES // itemsize // step, 1) * step
    for first in range(start, stop, most):
        yield first, min(first + most, stop)
