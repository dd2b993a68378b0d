"""The one storage of adapter tensors.

For each site, method and shape one array (slots, ...) per tensor, grown by doubling; an adapter owns a slot,
and its Parameters are views of it. A batch that mixes adapters reads the arrays as they are. The Parameters are
the truth: whoever moves one elsewhere (`.to`, `deepcopy`, an engine that flattens) is noticed by its data pointer,
and its values are taken from where they are.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist.lanes import Lanes

# Rows of a part from which calls of its own cost less than a copy of its tensors.
_SHORT = 4


class Bucket:
    """The adapters of one method and one set of shapes at one site.

    Attributes:
        arrays: name -> (slots, ...).
        owners: per slot the adapter's name, or None where it is free.
        held: per slot the Parameters that are meant to be views of it.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.arrays = {name: t.new_zeros((0, *t.shape)) for name, t in like.items()}
        self.owners: list[str | None] = []
        self.held: list[dict[str, nn.Parameter]] = []
        # The names that were last asked for row by row, and their slots.
        self._asked: tuple[tuple[str | None, ...] | None, tuple[int, ...] | None] = (None, None)

    @property
    def size(self) -> int:
        """How many elements an adapter has here."""
        return sum(a.stride(0) for a in self.arrays.values())

    def take(self, adapter: str, parameters: dict[str, nn.Parameter]) -> None:
        """Moves the values of `parameters` into a free slot and makes them views of it."""
        if None not in self.owners:
            self._grow()
        slot = self.owners.index(None)
        self.owners[slot], self.held[slot], self._asked = adapter, parameters, (None, None)
        for name, parameter in parameters.items():
            view = self.arrays[name][slot]
            if not view.is_meta:
                view.copy_(parameter.detach())
            parameter.data = view

    def release(self, adapter: str) -> None:
        """Frees the adapter's slot; its Parameters keep a copy of their own."""
        slot = self.owners.index(adapter)
        for parameter in self.held[slot].values():
            if self._is_view(slot, parameter):
                parameter.data = parameter.data.clone()
        self.owners[slot], self.held[slot], self._asked = None, {}, (None, None)

    def stacked(self, adapters: Sequence[str]) -> dict[str, Tensor]:
        """Name -> (k, ...), the tensors of the named adapters; a gradient reaches each Parameter itself."""
        slots = [self.owners.index(adapter) for adapter in adapters]
        return {name: self._stack(name, slots) for name in self.arrays}

    def by_row(self, adapters: Sequence[str | None]) -> list[tuple[slice, dict[str, Tensor]]] | None:
        """As `stacked`, for names that come more than once: the rows in parts, one after the other, each with its
        tensors (rows, ...). Rows whose adapters stand side by side here read the arrays as they are; where nothing of
        that saves anything, all rows are one part. None where an adapter is not here, or its Parameters are elsewhere
        by now."""
        slots = self.slots_of(adapters)
        return None if slots is None else self.of_slots(slots)

    def of_slots(self, slots: tuple[int, ...]) -> list[tuple[slice, dict[str, Tensor]]]:
        """`by_row` for the slots that `slots_of` gave."""
        trained = set()
        if torch.is_grad_enabled():
            held = [self.held[slot] for slot in dict.fromkeys(slots)]
            trained = {name for name in self.arrays if any(each[name].requires_grad for each in held)}
        if not trained and (runs := _runs(slots)) is not None:
            return [
                (
                    rows,
                    {
                        name: array[first : first + rows.stop - rows.start]
                        for name, array in self.arrays.items()
                    },
                )
                for rows, first in runs
            ]
        made = {}
        for name, array in self.arrays.items():
            values = array.index_select(0, _index(slots, array.device))
            parameters = (self.held[slot][name] for slot in slots)
            made[name] = _Stack.apply(values, *parameters) if name in trained else values
        return [(slice(0, len(slots)), made)]

    def slots_of(self, adapters: Sequence[str | None]) -> tuple[int, ...] | None:
        """The slots of adapters whose tensors `arrays` holds as they are now; None where one is not here, or its
        Parameters are elsewhere by now."""
        names = tuple(adapters)
        if names != self._asked[0]:
            self._asked = names, self._find(names)
        slots = self._asked[1]
        if slots is None:
            return None
        distinct = [(slot, self.held[slot]) for slot in set(slots)]
        for name, array in self.arrays.items():
            begin, step = array.data_ptr(), array.stride(0) * array.element_size()
            for slot, held in distinct:
                if held[name].data_ptr() != begin + slot * step:
                    return None
        return slots

    def _find(self, adapters: tuple[str | None, ...]) -> tuple[int, ...] | None:
        slot_of = {owner: slot for slot, owner in enumerate(self.owners) if owner is not None}
        if any(adapter not in slot_of for adapter in adapters):
            return None
        return tuple(slot_of[adapter] for adapter in adapters)  # type: ignore[index]

    def _stack(self, name: str, slots: list[int]) -> Tensor:
        parameters = [self.held[slot][name] for slot in slots]
        if not all(self._is_view(slot, p, name) for slot, p in zip(slots, parameters, strict=True)):
            return torch.stack(list(parameters))
        array, first = self.arrays[name], slots[0]
        neighbours = slots == list(range(first, first + len(slots)))
        values = array[first : first + len(slots)] if neighbours else array[slots]
        return _Stack.apply(values, *parameters)

    def _is_view(self, slot: int, parameter: nn.Parameter, name: str | None = None) -> bool:
        name = name or next(key for key, p in self.held[slot].items() if p is parameter)
        place = self.arrays[name]
        return (
            parameter.dtype == place.dtype
            and parameter.device == place.device
            and parameter.data_ptr() == place.data_ptr() + slot * place.stride(0) * place.element_size()
        )

    def _grow(self) -> None:
        more = max(1, len(self.owners))
        old = self.arrays
        at_home = [
            {name for name, p in held.items() if self._is_view(slot, p, name)}
            for slot, held in enumerate(self.held)
        ]
        arrays = {name: a.new_empty((len(a) + more, *a.shape[1:])) for name, a in old.items()}
        for name, a in old.items():
            if len(a) and not a.is_meta:
                arrays[name][: len(a)] = a
        self.arrays = arrays  # filled: a forward in another thread reads the old ones or these
        for slot, names in enumerate(at_home):
            for name in names:
                self.held[slot][name].data = self.arrays[name][slot]
        self.owners += [None] * more
        self.held += [{} for _ in range(more)]


@functools.lru_cache(maxsize=64)
def _index(slots: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(slots, device=device)


@functools.lru_cache(maxsize=64)
def _runs(slots: tuple[int, ...]) -> list[tuple[slice, int]] | None:
    """(rows, the first one's slot) of rows whose slots are neighbours; None where such parts are short."""
    starts = [i for i, slot in enumerate(slots) if i == 0 or slot != slots[i - 1] + 1]
    if _SHORT * len(starts) > len(slots):
        return None
    stops = [*starts[1:], len(slots)]
    return [(slice(start, stop), slots[start]) for start, stop in zip(starts, stops, strict=True)]


class _Stack(torch.autograd.Function):
    """values (k, ...), which are the k parameters' own memory; hands each its part of the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *parameters: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *gradient.unbind(0)


class AdapterPool:
    """Every bucket of one model, by (site, method, shapes, dtype, device).

    Attributes:
        waiting: (site, adapter) where tensors were made on meta and have no values yet.
        plans: site -> how packed rows are served there, by what they name; `named` of each are the adapters that
            it depends on, None among them where those are the active ones.
        lanes: site -> (rank, dtype, device) -> the adapters there that serve now, side by side.
        kinds: site -> adapter -> the class of its rank where it can have a lane, else 0.
        keeps_base: whether the base stays as it is also where an adapter's start would change it.
    """

    def __init__(self) -> None:
        self.keeps_base = False
        self.waiting: set[tuple[str, str]] = set()
        self.buckets: dict[tuple, Bucket] = {}
        self.homes: dict[tuple[str, str], Bucket] = {}
        self.plans: dict[str, dict[Hashable, Any]] = {}
        self.lanes: dict[str, dict[tuple, Lanes]] = {}
        self.kinds: dict[str, dict[str, int]] = {}

    def take(self, site: str, method: str, adapter: str, parameters: dict[str, nn.Parameter]) -> None:
        """Gives the adapter a slot at `site`; its Parameters become views of the pool. Again for one that is
        in: moves it to where its Parameters' dtype and device are now."""
        self.release(site, adapter)
        shapes = tuple((name, tuple(p.shape), p.dtype, p.device) for name, p in parameters.items())
        bucket = self.buckets.get((site, method, shapes))
        if bucket is None:
            bucket = self.buckets[site, method, shapes] = Bucket(parameters)
        bucket.take(adapter, parameters)
        self.homes[site, adapter] = bucket

    def release(self, site: str, adapter: str) -> None:
        """Frees the adapter's slot at `site`, where it has one."""
        self.changed(site, adapter)
        bucket = self.homes.pop((site, adapter), None)
        if bucket is not None:
            bucket.release(adapter)
            if not any(bucket.owners):
                self.buckets = {key: b for key, b in self.buckets.items() if b is not bucket}

    def changed(self, site: str, adapter: str) -> None:
        """To be called when an adapter's tensors at a site have other values: nothing made of the old ones is used."""
        plans = self.plans.get(site, {})
        for key in [key for key, plan in plans.items() if adapter in plan.named or None in plan.named]:
            del plans[key]
        self.kinds.get(site, {}).pop(adapter, None)
        for key, lanes in list(self.lanes.get(site, {}).items()):
            lanes.leave(adapter)
            if not lanes.lane_of:
                del self.lanes[site][key]

    def lanes_at(self, site: str, rank: int, shape: tuple[int, int], like: Tensor) -> Lanes:
        """The lanes of one class of ranks at a site of this (out, in), in the dtype and on the device of `like`."""
        here = self.lanes.setdefault(site, {})
        key = (rank, like.dtype, like.device)
        if key not in here:
            here[key] = Lanes(rank, shape[1], shape[0], like)
        return here[key]

    def bucket(self, site: str, adapter: str) -> Bucket | None:
        """Where the adapter's tensors at `site` are; adapters of one bucket can be stacked."""
        return self.homes.get((site, adapter))

    @property
    def num_bytes(self) -> int:
        """What the arrays take, free slots counted."""
        slots = sum(a.nbytes for bucket in self.buckets.values() for a in bucket.arrays.values())
        return slots + sum(lanes.num_bytes for here in self.lanes.values() for lanes in here.values())
