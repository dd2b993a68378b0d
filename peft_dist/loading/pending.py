"""Tensors that are not read yet: sources and what a conversion makes of them, of which any part can be read.

transformers describes how a checkpoint's tensors become a model's by operations on whole tensors (a mixture's
experts stacked, gate and up joined, a fused projection split). Given these in place of tensors, stacking, joining,
cutting and transposing read nothing: they say where each part of the result comes from. An operation that is not
known here reads its inputs whole and goes on with tensors, so that the result is always what the operation gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# What a conversion of dtype, or a look at a part, holds beside its result.
CHUNK_BYTES = 4 << 20


class Pending:
    """A tensor by shape and dtype whose values can be asked for in parts; flat numbers count row by row."""

    def __init__(self, shape: Iterable[int], dtype: torch.dtype) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype

    def _fill(self, start: int, out: Tensor) -> None:
        """Puts the values from flat number `start` on into `out` (flat, contiguous, of its dtype, on the CPU)."""
        raise NotImplementedError

    def read(self, start: int, out: Tensor) -> None:
        """Puts the values from flat number `start` on into `out` (1-D), cast to its dtype, moved to its device."""
        if out.dtype == self.dtype and out.device.type == "cpu" and out.is_contiguous():
            if out.numel():
                self._fill(start, out)
            return
        most = max(CHUNK_BYTES // self.dtype.itemsize, 1)
        buffer = torch.empty(min(most, out.numel()), dtype=self.dtype)
        for first in range(0, out.numel(), most):
            part = out[first : first + most]
            self._fill(start + first, buffer[: part.numel()])
            part.copy_(buffer[: part.numel()])

    def part(self, start: int, stop: int) -> Tensor:
        """The values with flat numbers [start, stop)."""
        out = torch.empty(stop - start, dtype=self.dtype)
        self.read(start, out)
        return out

    def whole(self) -> Tensor:
        """All of it."""
        return self.part(0, self.numel()).view(self.shape)

    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    def dim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    ndim = property(dim)

    def size(self, dim: int | None = None) -> Any:
        """Its shape, or the length of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def is_floating_point(self) -> bool:
        """Whether its values are floating."""
        return self.dtype.is_floating_point

    @property
    def device(self) -> torch.device:
        """Where its values come to."""
        return torch.device("cpu")

    def to(self, *args: Any, **kwargs: Any) -> Pending:
        """In another dtype; it stays where it is, since a device is chosen when values are read."""
        asked = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.dtype)]
        return _cast(self, asked[0]) if asked else self

    def contiguous(self) -> Pending:
        """Itself: its values always come row by row."""
        return self

    def detach(self) -> Pending:
        """Itself: nothing is differentiated here."""
        return self

    def clone(self) -> Pending:
        """Itself: reading makes a copy."""
        return self

    def reshape(self, *shape: Any) -> Pending:
        """The same values in the same order in another shape."""
        sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape)
        if -1 in sizes:
            sizes[sizes.index(-1)] = self.numel() // -math.prod(sizes)
        if math.prod(sizes) != self.numel():
            raise ValueError(f"a tensor of shape {tuple(self.shape)} cannot be reshaped to {tuple(sizes)}")
        return _Reshaped(self, sizes)

    view = reshape

    def unsqueeze(self, dim: int) -> Pending:
        """With a dimension of length 1 before `dim`."""
        at = dim % (self.dim() + 1)
        return self.reshape(*self.shape[:at], 1, *self.shape[at:])

    def squeeze(self, dim: int) -> Pending:
        """Without the dimension `dim` where its length is 1."""
        at = dim % self.dim()
        if self.shape[at] != 1:
            return self
        return self.reshape(*self.shape[:at], *self.shape[at + 1 :])

    def narrow(self, dim: int, start: int, length: int) -> Pending:
        """`length` of the dimension `dim` from `start` on."""
        return _Cut(self, dim % self.dim(), start, length)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Pending, ...]:
        """As torch.chunk."""
        return self.split(-(-self.size(dim) // chunks), dim)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[Pending, ...]:
        """As torch.split."""
        length = self.size(dim)
        if isinstance(sizes, int):
            sizes = [min(sizes, length - at) for at in range(0, length, sizes)]
        if sum(sizes) != length:
            raise ValueError(f"{list(sizes)} do not add up to {length}")
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        return tuple(self.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True))

    def unbind(self, dim: int = 0) -> tuple[Pending, ...]:
        """As torch.unbind."""
        return tuple(self.narrow(dim, at, 1).squeeze(dim) for at in range(self.size(dim)))

    def transpose(self, dim0: int, dim1: int) -> Pending:
        """With two dimensions swapped."""
        first, second = sorted((dim0 % self.dim(), dim1 % self.dim()))
        if first == second:
            return self
        if second == first + 1:
            batch = math.prod(self.shape[:first])
            rest = math.prod(self.shape[second + 1 :])
            shape = list(self.shape)
            shape[first], shape[second] = shape[second], shape[first]
            kind = _Transposed if rest == 1 else _Swapped
            return kind(self, batch, self.shape[first], self.shape[second], rest).reshape(shape)
        return InMemory(self.whole().transpose(dim0, dim1).contiguous())

    swapaxes = transpose

    def t(self) -> Pending:
        """A matrix with rows and columns swapped."""
        return self.transpose(0, 1) if self.dim() == 2 else self

    @property
    def T(self) -> Pending:
        """A matrix with rows and columns swapped."""
        return self.t()

    def __getitem__(self, index: Any) -> Any:
        if index is Ellipsis:
            return self
        return self.whole()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        # What is not known here is asked of the values themselves.
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        known = _KNOWN.get(function)
        if known is not None:
            return known(*args, **(kwargs or {}))
        return function(*_read(tuple(args)), **_read(dict(kwargs or {})))


class InMemory(Pending):
    """A tensor that was read."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.shape, tensor.dtype)
        self.tensor = tensor.detach().contiguous().view(-1)

    def _fill(self, start: int, out: Tensor) -> None:
        out.copy_(self.tensor[start : start + out.numel()])


class _Cast(Pending):
    def __init__(self, of: Pending, dtype: torch.dtype) -> None:
        super().__init__(of.shape, dtype)
        self.of = of

    def _fill(self, start: int, out: Tensor) -> None:
        self.of.read(start, out)


class _Reshaped(Pending):
    def __init__(self, of: Pending, shape: Sequence[int]) -> None:
        super().__init__(shape, of.dtype)
        self.of = of

    def _fill(self, start: int, out: Tensor) -> None:
        self.of.read(start, out)


class _Cut(Pending):
    def __init__(self, of: Pending, dim: int, first: int, length: int) -> None:
        shape = list(of.shape)
        if not 0 <= first <= first + length <= shape[dim]:
            raise IndexError(f"[{first}, {first + length}) is not within dimension {dim} of {tuple(shape)}")
        shape[dim] = length
        super().__init__(shape, of.dtype)
        self.of = of
        below = math.prod(of.shape[dim + 1 :])
        self.row, self.stride, self.skip = length * below, of.shape[dim] * below, first * below

    def _fill(self, start: int, out: Tensor) -> None:
        for row, column, at, count in _rows(start, out.numel(), self.row):
            self.of.read(row * self.stride + self.skip + column, out[at : at + count])


class _Joined(Pending):
    """Tensors one behind the other along a dimension."""

    def __init__(self, parts: Sequence[Pending], dim: int) -> None:
        shape = list(parts[0].shape)
        for part in parts:
            if [*part.shape[:dim], *part.shape[dim + 1 :]] != [*shape[:dim], *shape[dim + 1 :]]:
                raise ValueError(f"{tuple(part.shape)} cannot be joined to {tuple(shape)} along {dim}")
        shape[dim] = sum(part.shape[dim] for part in parts)
        dtype = parts[0].dtype
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
        super().__init__(shape, dtype)
        self.parts = parts
        below = math.prod(shape[dim + 1 :])
        self.widths = [part.shape[dim] * below for part in parts]
        self.starts = [sum(self.widths[:number]) for number in range(len(parts))]
        self.row = shape[dim] * below

    def _fill(self, start: int, out: Tensor) -> None:
        for row, column, at, count in _rows(start, out.numel(), self.row):
            for part, first, width in zip(self.parts, self.starts, self.widths, strict=True):
                low, high = max(column, first), min(column + count, first + width)
                if low < high:
                    here = at + low - column
                    part.read(row * width + low - first, out[here : here + high - low])


class _Transposed(Pending):
    """(batch, rows, columns) as (batch, columns, rows): runs of the columns that are asked for, row by row."""

    def __init__(self, of: Pending, batch: int, rows: int, columns: int, rest: int = 1) -> None:
        super().__init__((batch, columns, rows, rest), of.dtype)
        self.of, self.rows, self.columns, self.rest = of, rows, columns, rest

    def _fill(self, start: int, out: Tensor) -> None:
        # A band of the result at a time: as many of its rows as a chunk holds.
        band = max(CHUNK_BYTES // self.dtype.itemsize // self.rows, 1)
        stop = start + out.numel()
        while start < stop:
            which, inside = divmod(start, self.rows * self.columns)
            first, skipped = divmod(inside, self.rows)
            end = min(stop - which * self.rows * self.columns, self.rows * self.columns)
            last = min(first + band, -(-end // self.rows))
            block = torch.empty(self.rows, last - first, dtype=self.dtype)
            for row in range(self.rows):
                self.of.read((which * self.rows + row) * self.columns + first, block[row])
            count = min(last * self.rows, end) - inside
            out[:count] = block.T.reshape(-1)[skipped : skipped + count]
            out, start = out[count:], start + count


class _Swapped(_Transposed):
    """(batch, rows, columns, rest) as (batch, columns, rows, rest): `rest` values at a time."""

    def _fill(self, start: int, out: Tensor) -> None:
        for place, inside, at, count in _rows(start, out.numel(), self.rest):
            which, of_batch = divmod(place, self.rows * self.columns)
            column, row = divmod(of_batch, self.rows)
            source = ((which * self.rows + row) * self.columns + column) * self.rest
            self.of.read(source + inside, out[at : at + count])


def _rows(start: int, count: int, width: int) -> Iterable[tuple[int, int, int, int]]:
    """[start, start + count) by rows of `width`: row, first column, place in the range, number."""
    done = 0
    while done < count:
        row, column = divmod(start + done, width)
        length = min(width - column, count - done)
        yield row, column, done, length
        done += length


def _cast(of: Pending, dtype: torch.dtype) -> Pending:
    return of if of.dtype == dtype else _Cast(of, dtype)


def pending(value: Any) -> Pending:
    """`value` as one of these, whether it is a tensor or one already."""
    return value if isinstance(value, Pending) else InMemory(value)


def _cat(tensors: Sequence[Any], dim: int = 0, **kwargs: Any) -> Pending:
    parts = [pending(tensor) for tensor in tensors]
    return parts[0] if len(parts) == 1 else _Joined(parts, dim % parts[0].dim())


def _stack(tensors: Sequence[Any], dim: int = 0, **kwargs: Any) -> Pending:
    parts = [pending(tensor) for tensor in tensors]
    at = dim % (parts[0].dim() + 1)
    return _cat([part.unsqueeze(at) for part in parts], at)


def _read(value: Any) -> Any:
    if isinstance(value, Pending):
        return value.whole()
    if isinstance(value, list | tuple):
        return type(value)(_read(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _read(item) for key, item in value.items()}
    return value


_KNOWN: dict[Any, Callable[..., Any]] = {
    torch.cat: _cat,
    torch.concat: _cat,
    torch.stack: _stack,
    torch.chunk: lambda tensor, chunks, dim=0: pending(tensor).chunk(chunks, dim),
    torch.split: lambda tensor, split_size_or_sections, dim=0: pending(tensor).split(
        split_size_or_sections, dim
    ),
    torch.unbind: lambda tensor, dim=0: pending(tensor).unbind(dim),
    torch.transpose: lambda tensor, dim0, dim1: pending(tensor).transpose(dim0, dim1),
    torch.narrow: lambda tensor, dim, start, length: pending(tensor).narrow(dim, start, length),
    torch.squeeze: lambda tensor, dim: pending(tensor).squeeze(dim),
    torch.unsqueeze: lambda tensor, dim: pending(tensor).unsqueeze(dim),
    torch.reshape: lambda tensor, shape: pending(tensor).reshape(shape),
}
