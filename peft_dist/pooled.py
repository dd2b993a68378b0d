"""A layer's adapters: their tensors, which hang on the layer, and are views of the pool's storage."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from peft_dist.contract import Param
from peft_dist.errors import AdapterError
from peft_dist.holders import Place, hang, room
from peft_dist.pauses import pause
from peft_dist.pool import AdapterPool

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
            name: hang(self, param, adapter, room(param, dtype, device)) for name, param in wanted.items()
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
