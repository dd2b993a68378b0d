"""The one storage of adapter tensors.

For each site, method and shape one array (slots, ...) per tensor, grown by doubling; an adapter owns a slot,
and its Parameters are views of it. A batch that mixes adapters reads the arrays as they are. The Parameters
are the
truth: whoever moves one elsewhere (`.to`, `deepcopy`, an engine that flattens) is noticed by its data
pointer, and its values are taken from where they are.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from peft_dist.contract import Param
from peft_dist.errors import AdapterError
from peft_dist.lanes import Lanes
from peft_dist.pauses import pause

# Rows of a part from which calls of its own cost less than a copy of its tensors.
_SHORT = 4
# On a Parameter that hangs on no module any more.
_GONE = "_peft_dist_gone"


def is_gone(parameter: Tensor) -> bool:
    """Whether its adapter was deleted, or has other tensors in its place."""
    return hasattr(parameter, _GONE)


# tensor -> (the module that holds it, its adapter); not on the tensor, which is pickled with all that it has
_HOLDERS: Any = WeakIdKeyDictionary()


def holder_of(parameter: Tensor) -> PooledModule | None:
    """The module on which an adapter's tensor hangs."""
    holder, _ = _HOLDERS.get(parameter, (None, None))
    return None if holder is None else holder()


def adapter_of(parameter: Tensor) -> str | None:
    """The adapter that a tensor belongs to; None for one of no adapter."""
    return _HOLDERS.get(parameter, (None, None))[1]


def leave_pool(parameter: Tensor) -> None:
    """Gives the tensors of the parameter's adapter at its layer memory of their own."""
    holder, adapter = _HOLDERS[parameter]
    holder()._pool.release(holder()._site_name, adapter)


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


class Tensors(nn.Module):
    """A leaf that holds what hangs below an adapter's name: `lora_A.NAME` with its `.weight`.

    Where that is a matrix, programs take it for the linear layer that HF PEFT has there.
    """

    @property
    def out_features(self) -> int:
        """The rows of its matrix."""
        return self._matrix("out_features").shape[0]

    @property
    def in_features(self) -> int:
        """The columns of its matrix."""
        return self._matrix("in_features").shape[1]

    def _matrix(self, wanted: str) -> Tensor:
        weight = self._parameters.get("weight")
        if weight is None or weight.ndim != 2:
            raise AttributeError(f"{self.extra_repr()} is no matrix, so it has no {wanted}")
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) by its matrix, and its bias: (..., out)."""
        return nn.functional.linear(x, self._matrix("forward"), self._parameters.get("bias"))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}{tuple(p.shape)}" for name, p in self._parameters.items() if p is not None)


class Held(nn.ModuleDict):
    """What hangs below one name of a layer: adapter -> its tensors. Modules of a program's own would not be called."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        raise AdapterError(
            f"{key!r}: an adapter's tensors cannot be replaced by a module. Copy values into its weight, or set "
            "the weight."
        )

    def _get_name(self) -> str:
        return "ModuleDict"


class HeldTensors(nn.ParameterDict):
    """What hangs below one name of a layer: adapter -> its tensor, a buffer where it is not trained."""

    def __setitem__(self, key: str, value: Any) -> None:
        held = self._buffers.get(key)
        if held is None or isinstance(value, nn.Parameter):
            super().__setitem__(key, value)
        elif value is not held:
            # `+=` puts the very tensor back.
            self._buffers[key] = value.to(held)

    def _get_name(self) -> str:
        return "ParameterDict"


class Place(NamedTuple):
    """Where a tensor hangs: a module, the name of its table, and the key there.

    The table is looked up each time, and read as a plain dict: DeepSpeed puts one of its own in its place, which takes
    a tensor in pieces for a weight of the layer that runs when it is read.
    """

    holder: nn.Module
    table: str
    key: str

    @property
    def tensor(self) -> Any:
        """The Parameter or buffer."""
        return dict.__getitem__(getattr(self.holder, self.table), self.key)

    def put(self, tensor: Tensor) -> None:
        """Hangs another there."""
        getattr(self.holder, self.table)[self.key] = tensor


class PooledModule(nn.Module):
    """A module on which adapters' tensors hang under HF PEFT's names, and live in the pool.

    Attributes:
        unites: whether equal tensors of several adapters that are not trained take memory once.
    """

    unites: ClassVar[bool] = False

    def __init__(self, pool: AdapterPool, site_name: str) -> None:
        super().__init__()
        self._pool = pool
        self._site_name = site_name
        # adapter -> method's tensor name -> where it hangs
        self._places: dict[str, dict[str, Place]] = {}
        self._wanted: dict[str, dict[str, Param]] = {}
        # adapter -> what its method is called: only tensors of one method are stacked
        self._families: dict[str, str] = {}
        # the children that only hold adapters' tensors
        self._holders: set[str] = set()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that have tensors here, in the order they were added."""
        return tuple(self._places)

    def has(self, adapter: str) -> bool:
        """Whether the adapter has tensors here."""
        return adapter in self._places

    def wanted(self, adapter: str) -> dict[str, Param]:
        """What the adapter's method asked for here, by the method's own names."""
        return self._wanted.get(adapter, {})

    def tensors(self, adapter: str) -> dict[str, Any]:
        """The adapter's own tensors here, by the method's own names: Parameters, and buffers where they are
        not trained."""
        places = self._places[adapter].items()
        return {name: dict.__getitem__(getattr(holder, table), key) for name, (holder, table, key) in places}

    def hold(
        self, adapter: str, method: str, wanted: dict[str, Param], dtype: torch.dtype, device: Any
    ) -> None:
        """Makes room for the adapter's tensors, unfilled, zero; those that follow from its config are
        filled."""
        self._wanted[adapter] = wanted
        self._families[adapter] = method
        self._holders |= {param.key.partition(".")[0] for param in wanted.values()}
        self._places[adapter] = {
            name: _hang(self, param, adapter, _room(param, dtype, device)) for name, param in wanted.items()
        }
        self._fill_fixed(adapter)
        self.take_in(adapter)
        for tensor in self.tensors(adapter).values():
            _HOLDERS[tensor] = (weakref.ref(self), adapter)
        if any(t.is_meta for t in self.tensors(adapter).values()):
            self._pool.waiting.add((self._site_name, adapter))

    def is_waiting(self, adapter: str) -> bool:
        """Whether tensors of the adapter here rest on meta, without values."""
        key = (self._site_name, adapter)
        if key not in self._pool.waiting or not self.has(adapter):
            return False
        if any(t.is_meta for t in self.tensors(adapter).values()):
            return True
        # Another library gave them values.
        self._pool.waiting.discard(key)
        return False

    def check_filled(self, adapter: str) -> None:
        """Raises AdapterError where the adapter's tensors here have no values yet."""
        if self.is_waiting(adapter):
            where = f"{self._site_name}: " if self._site_name else ""
            raise AdapterError(
                f"{where}adapter {adapter!r} is still on the meta device: its tensors have no values. Load a "
                "checkpoint into it, or give the base its values and call peft_dist.inject.start_waiting(model)."
            )

    def let_train(self, adapter: str, requires_grad: bool) -> None:
        """Lets the adapter's tensors be trained, or not; frozen ones stay frozen. Nothing where it has none."""
        for name, param in self.wanted(adapter).items():
            self._places[adapter][name].tensor.requires_grad_(requires_grad and param.trainable)

    def fill(self, adapter: str) -> None:
        """Fills the adapter's tensors as its method starts them."""
        self.part(adapter)
        with torch.no_grad():
            for name, tensor in self.tensors(adapter).items():
                self._wanted[adapter][name].start(tensor.detach())
        self.unite(adapter)

    def part(self, adapter: str) -> None:
        """Gives the adapter memory of its own for what it has in common with others: it is to be written."""
        for name, place in self._united(adapter):
            if any(place.tensor is t for t in self._others(adapter, name)):
                place.put(place.tensor.clone())

    def unite(self, adapter: str) -> None:
        """Lets the adapter's tensors that are not trained be those of another, where they are equal."""
        for name, place in self._united(adapter):
            mine = place.tensor
            alike = (
                t for t in self._others(adapter, name) if (t.dtype, t.device) == (mine.dtype, mine.device)
            )
            place.put(next((t for t in alike if t is mine or torch.equal(t, mine)), mine))

    def _united(self, adapter: str) -> list[tuple[str, Place]]:
        places = self._places[adapter].items() if self.unites else ()
        return [
            (name, place)
            for name, place in places
            if not (isinstance(place.tensor, nn.Parameter) or place.tensor.is_meta)
        ]

    def _others(self, adapter: str, name: str) -> list[Tensor]:
        others = (
            places[name] for other, places in self._places.items() if other != adapter and name in places
        )
        return [place.tensor for place in others if not place.tensor.is_meta]

    def _fill_fixed(self, adapter: str) -> None:
        with torch.no_grad():
            for name, param in self._wanted[adapter].items():
                tensor = self._places[adapter][name].tensor
                if not param.persistent and not tensor.is_meta:
                    param.start(tensor)
        self.unite(adapter)

    def drop(self, adapter: str) -> None:
        """Removes the adapter's tensors."""
        for tensor in self.tensors(adapter).values():
            setattr(tensor, _GONE, True)
        self._pool.release(self._site_name, adapter)
        self._pool.waiting.discard((self._site_name, adapter))
        for param in self._wanted.pop(adapter).values():
            first, _, _ = param.key.partition(".")
            holder = self._modules.get(first)
            if holder is None:
                continue
            for kept in (holder._modules, holder._parameters, holder._buffers, getattr(holder, "_keys", {})):
                kept.pop(adapter, None)
            if not (holder._modules or holder._parameters or holder._buffers):
                del self._modules[first]
        del self._places[adapter], self._families[adapter]

    def materialise(self, adapter: str, device: Any) -> None:
        """Gives tensors that rest on meta real memory on `device`, unfilled; others stay as they are. A Parameter
        stays the one that it is, since an optimizer may have it."""
        if not any(p.is_meta for p in self.tensors(adapter).values()):
            return
        for place in self._places[adapter].values():
            old = place.tensor
            if old.is_meta:
                room = torch.empty_like(old, device=device)
                if isinstance(old, nn.Parameter):
                    # What torch.utils.swap_tensors does, which refuses where anyone has a weak reference: those
                    # are to the Parameter, which stays.
                    torch._C._swap_tensor_impl(old, nn.Parameter(room, old.requires_grad))  # type: ignore[attr-defined]
                else:
                    place.put(room)
        self._fill_fixed(adapter)
        self.take_in(adapter)
        self._pool.waiting.discard((self._site_name, adapter))

    def empty(self, adapter: str) -> None:
        """Lets go of the memory of the adapter's tensors: they rest on meta, to be filled again."""
        wanted, family = self._wanted[adapter], self._families[adapter]
        dtype = next(
            (t.dtype for t in self.tensors(adapter).values() if t.is_floating_point()), torch.float32
        )
        self.drop(adapter)
        self.hold(adapter, family, wanted, dtype, "meta")

    def take_in(self, adapter: str) -> None:
        """Lets the pool see where the adapter's Parameters are now, and of which dtype."""
        trained = {name: p for name, p in self.tensors(adapter).items() if isinstance(p, nn.Parameter)}
        if any(hasattr(p, "ds_id") for p in trained.values()):
            return  # they rest in pieces, which are nobody's views
        self._pool.take(self._site_name, self._families[adapter], adapter, trained)

    def _apply(self, fn: Any, recurse: bool = True) -> PooledModule:
        before = {
            a: {n: (p.data_ptr(), p.dtype, p.device) for n, p in self.tensors(a).items()}
            for a in self._places
        }
        super()._apply(fn, recurse)
        for adapter, old in before.items():
            now = {n: (p.data_ptr(), p.dtype, p.device) for n, p in self.tensors(adapter).items()}
            if now != old:
                self.take_in(adapter)
                self.unite(adapter)
        return self


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without the modules that only hold adapters' tensors: as many as there are
    layers, however many adapters."""
    seen: set[int] = set()
    ahead: list[tuple[str, nn.Module]] = [("", model)]
    while ahead:
        name, module = ahead.pop()
        if id(module) in seen:
            continue
        pause()
        seen.add(id(module))
        yield name, module
        holders = module._holders if isinstance(module, PooledModule) else ()
        ahead += [
            (f"{name}.{key}" if name else key, child)
            for key, child in reversed(module._modules.items())
            if child is not None and key not in holders
        ]


def name_in(model: nn.Module, wanted: Any) -> str | None:
    """What a model calls one of its `outer_modules`; None where it is none of them."""
    return next((name for name, module in outer_modules(model) if module is wanted), None)


def _room(param: Param, dtype: torch.dtype, device: Any) -> Tensor:
    room = torch.empty(param.shape, dtype=torch.int64 if param.is_index else dtype, device=device)
    is_parameter = param.trainable or param.counted
    return nn.Parameter(room, param.trainable) if is_parameter else room


def _hang(module: nn.Module, param: Param, adapter: str, tensor: Tensor) -> Place:
    """Hangs `tensor` on `module` under the key of `param`, the adapter's name after its first part."""
    first, _, rest = param.key.partition(".")
    if first not in module._modules:
        # Past `add_module`, which takes what hangs on a wrapper inside this one for this one's.
        module._modules[first] = Held() if rest else HeldTensors()
    # Into the dictionaries themselves: an adapter may be called `v1.2` or `keys`, which their doors refuse.
    node: Any = module._modules[first]
    last = adapter
    if rest:
        if adapter not in node._modules:
            node._modules[adapter] = Tensors()
        node = node._modules[adapter]
        *between, last = rest.split(".")
        for part in between:
            if part not in node._modules:
                node.add_module(part, Tensors())
            node = node._modules[part]
    elif isinstance(node, nn.ParameterDict):  # not where another method has modules under this name
        node._keys[adapter] = None
    if not isinstance(tensor, nn.Parameter) and not param.persistent:
        node._non_persistent_buffers_set.add(last)
    place = Place(node, "_parameters" if isinstance(tensor, nn.Parameter) else "_buffers", last)
    place.put(tensor)
    if isinstance(node, Tensors) and last == "weight":
        # A linear layer without a bias says None.
        node._parameters.setdefault("bias", None)
    return place
