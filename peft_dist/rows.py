"""Which adapter serves which part of an input, and which mask dropout draws there.

A mask is a function of (seed, step, the sample's index in the global batch, site, position, channel) alone:
it does not depend on the rank, on what else is in the batch, on padding to the right, on the device, or on
whether the forward is a recomputation under gradient checkpointing.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_dist.bins import Bins
from peft_dist.contract import Site
from peft_dist.errors import RowsError
from peft_dist.joint import Joint
from peft_dist.made import Made
from peft_dist.siblings import Siblings

BASE = "__base__"


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows, in sorted order, that one choice of adapters serves; None stands for the active
    ones."""

    adapter: str | None
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Rows:
    """What the rows of one batch are, for the time of `model.using(rows)`.

    Args:
        adapters: for each sequence an adapter's name, `"__base__"` for the bare base, or None for the active
            adapters; None as a whole: the active adapters serve all.
        samples: (B,) each sequence's index in the global batch, int64. With it dropout is stateless; without
            it, torch's generator draws the masks.
        seed: of the run. step: the optimizer step.
        streams: adapter -> its own (seed, step), where the rows are of several runs at once, whose samples are
            numbered each for itself.
        bins: where several sequences stand in one row of the batch: which, and how long they are. Adapters and samples
            are still those of the sequences.
    """

    adapters: Sequence[str | None] | None = None
    samples: Tensor | None = None
    seed: int = 0
    step: int = 0
    streams: Mapping[str, tuple[int, int]] | None = None
    bins: Bins | None = None
    segments: tuple[Segment, ...] = field(init=False, repr=False)
    order: list[int] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.adapters is not None and self.samples is not None and len(self.adapters) != len(self.samples):
            raise RowsError(
                f"Rows: {len(self.adapters)} adapters for {len(self.samples)} samples. Give one of each "
                "per sequence."
            )
        if self.bins is not None and self.bins.num not in (
            len(given) for given in (self.adapters, self.samples) if given is not None
        ):
            raise RowsError(
                f"Rows: bins of {self.bins.num} sequences. Give an adapter or a sample for each of them."
            )
        order, segments = _sorted_segments(self.adapters) if self.adapters is not None else (None, ())
        object.__setattr__(self, "segments", segments)
        object.__setattr__(self, "order", order)

    @property
    def num(self) -> int | None:
        """How many sequences these rows are; None where nothing says so."""
        if self.adapters is not None:
            return len(self.adapters)
        return None if self.samples is None else len(self.samples)

    @property
    def named(self) -> set[str]:
        """Every adapter that serves one of the rows by its name."""
        return {s.adapter for s in self.segments if s.adapter is not None and s.adapter != BASE}

    def stream_of(self, adapter: str | None, site: str) -> tuple[int, int]:
        """The keys of the random stream of an adapter's rows at a site."""
        seed, step = self.seed, self.step
        if self.streams is not None and adapter is not None:
            seed, step = self.streams.get(adapter, (seed, step))
        return stream(seed, step, site)

    def of(self, site: Site, x: Tensor, length: int | None) -> Split:
        """How these rows divide x (rows, ...), the input of `site`.

        One row that all share (a position table's) is broadcast first; (rows x length, ...) is taken apart,
        where `length` is the number of positions of the model's input.

        Raises:
            RowsError: x is none of these; names the site.
        """
        num = self.num
        if self.bins is not None:
            return self._of_bins(site, x, self.bins)
        if num is not None and is_routed(site.name) and (x.ndim < 3 or x.shape[0] != num):
            raise RowsError(
                f"{site.name}: an expert is given the tokens that a router sent to it, and rows cannot tell "
                "whose they are. Run one adapter at a time, or leave the experts out."
            )
        if num is None or x.shape[0] == num:
            return Split(self, x, None)
        if x.shape[0] == 1:
            return Split(self, x.expand(num, *x.shape[1:]), None)
        if length is not None and x.shape[0] == num * length:
            return Split(self, x.unflatten(0, (num, length)), length)
        raise RowsError(
            f"{site.name}: its input has {x.shape[0]} rows, but the batch has {num} sequences"
            + (f" of {length} positions" if length else "")
            + ". Rows cannot tell which adapter serves which part of it; run one adapter at a time."
        )

    def _of_bins(self, site: Site, x: Tensor, bins: Bins) -> Split:
        count, width = bins.shape
        if not is_routed(site.name):
            if x.ndim > 1 and x.shape[1] == width and x.shape[0] in (1, count):
                return Split(self, bins.apart(x.expand(count, *x.shape[1:])), None, bins)
            if x.shape[0] == count * width:
                return Split(self, bins.apart(x.unflatten(0, bins.shape)), width, bins)
        raise RowsError(
            f"{site.name}: its input {tuple(x.shape)} is not of {count} rows with {width} positions, so nothing tells "
            "which sequence a part of it belongs to. Turn sample packing off, or leave the layer out."
        )

    def apart(self) -> Rows:
        """The same sequences, each in a row of its own."""
        return dataclasses.replace(self, bins=None)


@functools.lru_cache(maxsize=4096)
def is_routed(name: str) -> bool:
    """Whether it is one of a list of experts, or in one: however many tokens it gets, their number says
    nothing."""
    return re.search(r"(^|\.)\w*experts?\w*\.(.*\.)?\d+(\.|$)", name) is not None


def _sorted_segments(adapters: Sequence[str | None]) -> tuple[list[int] | None, tuple[Segment, ...]]:
    names = list(dict.fromkeys(adapters))
    order = sorted(range(len(adapters)), key=lambda row: names.index(adapters[row]))
    segments, start = [], 0
    for name in names:
        stop = start + sum(1 for a in adapters if a == name)
        segments.append(Segment(name, start, stop))
        start = stop
    return (None if order == list(range(len(adapters))) else order), tuple(segments)


@dataclass(frozen=True)
class Split:
    """An input x (rows, ...) of a site, one row per sequence, and the way back to the site's own shape."""

    rows: Rows
    x: Tensor
    length: int | None
    bins: Bins | None = None

    def sorted(self, x: Tensor) -> Tensor:
        """x with the rows of each adapter side by side."""
        return x if self.rows.order is None else x[self.rows.order]

    def unsorted(self, y: Tensor) -> Tensor:
        """y (rows, ...) in the order of the batch again."""
        order = self.rows.order
        if order is None:
            return y
        back = [0] * len(order)
        for place, row in enumerate(order):
            back[row] = place
        return y[back]

    def restored(self, y: Tensor) -> Tensor:
        """y (rows, ...) in the shape that the site's input had."""
        if self.bins is not None:
            y = self.bins.together(y)
        return y if self.length is None else y.flatten(0, 1)


@dataclass(frozen=True)
class Cut:
    """Whole calls of a module, taken apart by rows: every tensor among its arguments that has a row for each
    sequence, or a token for each position of each sequence."""

    rows: Rows
    site: Site
    length: int | None

    def of(self, tree: Any, segment: Segment) -> Any:
        """`tree` of tuples, lists and dictionaries, its tensors cut to the rows of a segment."""
        if self.rows.bins is not None:
            raise RowsError(
                f"{self.site.name}: sequences that share rows cannot name different adapters here. Turn sample packing "
                "off, or run one adapter at a time."
            )
        if isinstance(tree, Tensor):
            return self._cut(tree, segment)
        if isinstance(tree, dict):
            return {key: self.of(part, segment) for key, part in tree.items()}
        if isinstance(tree, (tuple, list)):
            return type(tree)(self.of(part, segment) for part in tree)
        return tree

    def _cut(self, t: Tensor, segment: Segment) -> Tensor:
        if t.ndim == 0 or t.shape[0] == 1:
            return t
        split = self.rows.of(self.site, t, self.length)
        return split.restored(split.sorted(split.x)[segment.start : segment.stop])

    def joined(self, parts: Sequence[Any]) -> Any:
        """The outputs of all segments, in their order, as the output of one call."""
        first = parts[0]
        if isinstance(first, Tensor):
            whole = torch.cat(list(parts))
            split = self.rows.of(self.site, whole, self.length)
            return split.restored(split.unsorted(split.x))
        if isinstance(first, (tuple, list)):
            return type(first)(self.joined(each) for each in zip(*parts, strict=True))
        return first


def token_input(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """What a call of a model gives it to read: `input_ids`, or `inputs_embeds` in their place; (rows, positions)
    come first in both."""
    given = args[0] if args else kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if given is None else given


@dataclass
class Current:
    """What a model is running now; one object, shared by all its adapted modules.

    A plain attribute and not a context variable: autograd recomputes checkpointed layers in threads of its
        own.

    Args:
        rows: of the batch, or None.
        length: positions of the model's input, where known.
        padding: (B,) how many positions stand before each sequence's own because others in the batch have
        more
            virtual tokens; None where there are none.
        batch: arguments of the model's forward that methods read: name -> (B, ...).
        made: what adapters make for all their layers at once, while a whole model's forward runs.
        siblings: the layers that take one input.
        joint: what adapters run with in the place of their Parameters, where a user's own engine trains them.
    """

    rows: Rows | None = None
    length: int | None = None
    padding: Tensor | None = None
    batch: dict[str, Tensor] = field(default_factory=dict)
    made: Made | None = field(default=None, repr=False, compare=False)
    siblings: Siblings = field(default_factory=Siblings, repr=False, compare=False)
    joint: Joint | None = field(default=None, repr=False, compare=False)

    def take(self, other: Current) -> None:
        """Says what `other` says."""
        self.rows, self.length, self.padding = other.rows, other.length, other.padding
        self.batch, self.joint = other.batch, other.joint

    def run_with(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """An adapter's tensors, as its layers are to compute with them now."""
        return tensors if self.joint is None else self.joint.of(tensors)

    def padding_of(self, samples: Tensor, adapter: str | None = None) -> Tensor | None:
        """`padding` of the sequences with these indices in the global batch; in that of the adapter, where rows are of
        several runs."""
        rows, padding = self.rows, self.padding
        if padding is None or rows is None or rows.samples is None:
            return None
        is_it = samples.to(padding.device)[:, None] == rows.samples.to(padding.device)
        if rows.streams is not None and rows.adapters is not None:
            is_it &= torch.tensor([name == adapter for name in rows.adapters], device=padding.device)
        return padding[is_it.int().argmax(1)]


def drop(x: Tensor, p: float, samples: Tensor, key: tuple[int, int], padding: Tensor | None = None) -> Tensor:
    """x (rows, ..., channels) with a share p of its elements zero and the rest scaled by 1 / (1 - p)."""
    keep = keep_mask(tuple(x.shape), p, samples.to(x.device), key, padding)
    return x.mul(keep).mul_(1 / (1 - p))


def keep_mask(
    shape: tuple[int, ...],
    p: float,
    samples: Tensor,
    key: tuple[int, int],
    padding: Tensor | None = None,
) -> Tensor:
    """The boolean mask of elements that stay: shape (rows, ..., channels), samples (rows,) int64.

    `padding` (rows,) counts the positions before a row's own, so that its mask does not depend on them.
    """
    device = samples.device
    row = _mixed(samples.to(torch.int32) * _A + key[0])
    positions = torch.Size(shape[1:-1]).numel()
    counted = torch.arange(positions, dtype=torch.int32, device=device)
    if padding is not None and len(shape) > 2:
        before = padding.to(device, torch.int32) * (positions // shape[1])
        counted = counted - before[:, None]
    place = _mixed(row[:, None] + counted * _B)
    channel = _mixed(torch.arange(shape[-1], dtype=torch.int32, device=device) * _C + key[1])
    bits = _mixed(place[:, :, None] ^ channel)
    return (bits >= int(p * 2**32) - 2**31).view(shape)


def drop_in_bins(x: Tensor, p: float, samples: Tensor, key: tuple[int, int], bins: Bins) -> Tensor:
    """`drop` of x (bins, width, channels) in which sequences share rows: the masks of each are those of its own row."""
    samples = samples.to(x.device)
    sequence, counted = bins.places(x)
    row = _mixed(samples.to(torch.int32) * _A + key[0])
    place = _mixed(row[sequence] + counted.to(torch.int32) * _B)
    channel = _mixed(torch.arange(x.shape[-1], dtype=torch.int32, device=x.device) * _C + key[1])
    keep = _mixed(place[:, :, None] ^ channel) >= int(p * 2**32) - 2**31
    return x.mul(keep).mul_(1 / (1 - p))


def uniform(shape: tuple[int, ...], samples: Tensor, key: tuple[int, int]) -> Tensor:
    """Numbers in [0, 1), fp32: (rows, *shape) for samples (rows,) int64; a row's depend on its sample
    alone."""
    row = _mixed(samples.to(torch.int32) * _A + key[0])
    place = torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=samples.device) * _C + key[1]
    bits = _mixed(row[:, None] ^ place)
    # The 24 bits that fp32 holds exactly.
    return ((bits >> 8).bitwise_and_(0xFFFFFF).float() * 2.0**-24).view(len(samples), *shape)


@functools.lru_cache(maxsize=4096)
def stream(seed: int, step: int, site: str) -> tuple[int, int]:
    """Two 32-bit keys, signed, of the random stream of one site at one step."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + zlib.crc32(site.encode())) & _64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & _64
    z ^= z >> 31
    return _signed(z & 0xFFFFFFFF), _signed(z >> 32)


def _mixed(h: Tensor) -> Tensor:
    """A bijection of int32 in which each bit of the argument reaches the upper bits of the result; in place.

    Two rounds of xor-shift and multiply, after murmur3's finaliser, with wrapping products. Torch shifts the
    sign in from the left, so what a shift brings there is masked out."""
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    h *= _M1
    h ^= (h >> 13).bitwise_and_(0x7FFFF)
    h *= _M2
    return h


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


_64 = 2**64 - 1
_A, _B, _C = _signed(0x9E3779B1), _signed(0x85EBCA77), _signed(0xC2B2AE3D)
_M1, _M2 = _signed(0x85EBCA6B), _signed(0xC2B2AE35)
