"""What every wrapper of a layer shares: whose adapters are on it, which serve, and what their methods get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist.adapted import own_base
from peft_dist.base_layer import Layer
from peft_dist.contract import Draw, Method, Params
from peft_dist.errors import AdapterError, RowsError
from peft_dist.layer_api import LayerApi
from peft_dist.made import makes
from peft_dist.pool import AdapterPool
from peft_dist.pooled import PooledModule
from peft_dist.rows import BASE, Current, Rows, uniform
from peft_dist.sharding import is_partitioned, reach, set_whole, whole, whole_shape


class AdapterModule(LayerApi, PooledModule):
    """What the wrappers below share: whose adapters are here, and which serve.

    Attributes:
        methods: adapter -> its method here.
        active_adapters: the names that serve rows which name none; also names that have nothing here, but for modules
            and tokens that are trained beside adapters elsewhere.
        disabled: whether the bare base serves.
        merged_adapters: the names whose change is in the base's weights now, in the order they were merged.
    """

    base: Layer
    _told_active: list[str]
    _common: PooledModule | None
    _commons: dict[str, PooledModule]
    _lenders: dict[str, AdapterModule]

    def __init__(
        self, pool: AdapterPool, site_name: str, current: Current, common: PooledModule | None = None
    ) -> None:
        super().__init__(pool, site_name)
        self.methods: dict[str, Any] = {}
        self.active_adapters: list[str] = []
        self.disabled = False
        self.merged_adapters: list[str] = []
        self._current = current
        # Not a submodule: it holds what the adapters of all layers share, and hangs above them.
        self.__dict__["_common"] = common
        # Adapter -> another such module, of a model that came to be around the base after the layer was wrapped.
        self.__dict__["_commons"] = {}
        # Adapter -> the module whose tensors serve here too.
        self.__dict__["_lenders"] = {}

    @property
    def active_adapters(self) -> list[str]:
        told: list[str] = self.__dict__["_told_active"]
        if all(method.is_beside for method in self.methods.values()):
            return [name for name in told if name in self.methods]
        return told

    @active_adapters.setter
    def active_adapters(self, names: list[str]) -> None:
        self.__dict__["_told_active"] = names

    def add(self, adapter: str, method: Method, layer: Layer, dtype: torch.dtype, device: Any) -> None:
        """Makes room for an adapter's tensors, unfilled."""
        self.hold(adapter, type(method).__name__, method.params(layer.site), dtype, device)  # type: ignore[attr-defined]
        self.methods[adapter] = method

    def share(self, adapter: str, common: PooledModule | None) -> None:
        """Says on which module what the adapter's layers share hangs."""
        self._commons.pop(adapter, None)
        if common is not None and common is not self._common:
            self._commons[adapter] = common

    def borrow(self, adapter: str, method: Method, lender: AdapterModule) -> None:
        """Lets an adapter act here by its tensors at `lender`, whose layer shares this one's weight."""
        self.hold(adapter, type(method).__name__, {}, torch.float32, "cpu")
        self.methods[adapter] = method
        self._lenders[adapter] = lender

    def start(self, adapter: str, layer: Layer) -> None:
        """Fills an adapter's tensors; a collective where its method reads a partitioned weight."""
        self.begin(adapter, layer)
        self.replace_base(adapter, layer)

    def begin(self, adapter: str, layer: Layer) -> None:
        """The first half of `start`: the tensors alone."""
        self._start(adapter, {name: t.detach() for name, t in self.tensors(adapter).items()}, layer)

    def replace_base(self, adapter: str, layer: Layer) -> None:
        """Lets the adapter's method change the layer, where it does; where the pool keeps the base, what it would
        change stands beside the layer, for this adapter alone."""
        method = own_base.plain(self.methods[adapter])
        if type(method).replace_base is not Method.replace_base:
            p = self.tensors(adapter)
            if not any(t.is_meta for t in p.values()):
                with torch.no_grad():
                    if self._pool.keeps_base:
                        self.methods[adapter] = own_base.beside(method, p, layer, self.methods.values())
                    else:
                        method.replace_base(p, layer)

    def complete(self, adapter: str, missing: Sequence[str], layer: Layer) -> None:
        """Fills the named tensors alone, as `start` would: a checkpoint lacked them."""
        own = self.tensors(adapter)
        made = {name: torch.empty(whole_shape(t), dtype=t.dtype, device=t.device) for name, t in own.items()}
        self._start(adapter, made, layer)
        for name in missing:
            set_whole(own[name], made[name])

    def _start(self, adapter: str, own: dict[str, Tensor], layer: Layer) -> None:
        with torch.no_grad():
            for name, param in self.wanted(adapter).items():
                if not own[name].is_meta:
                    param.start(own[name])
            shared = self._shared(adapter)
            # No forward runs for which they could be gathered.
            p = {name: whole(t) if is_partitioned(t) else t for name, t in shared.items()} | own
            if not any(t.is_meta for t in p.values()):
                self.methods[adapter].start_from_base(p, layer)

    def delete(self, adapter: str) -> None:
        """Removes an adapter.

        Raises:
            AdapterError: it is merged.
        """
        if adapter in self.merged_adapters:
            raise AdapterError(f"{self._site_name}: {adapter!r} is merged. Unmerge it before deleting it.")
        self.drop(adapter)
        del self.methods[adapter]
        self._lenders.pop(adapter, None)
        self._commons.pop(adapter, None)
        self.active_adapters = [name for name in self._told_active if name != adapter]

    def named(self, choice: str | None) -> tuple[str, ...]:
        """The adapters here that `serving` would let serve."""
        names = self._told_active if choice is None else () if choice == BASE else (choice,)
        return tuple(name for name in names if name in self.methods)

    def refuse_rows_while_merged(self) -> None:
        """Raises RowsError where adapters are merged, so that none can be chosen for a row."""
        if self.merged_adapters:
            raise RowsError(
                f"{self._site_name}: {self.merged_adapters} are merged. Unmerge to name adapters per row."
            )

    def serving(self, choice: str | None) -> tuple[str, ...]:
        """The adapters here that serve rows with this choice: a name, `"__base__"`, or None for the active
        ones. Within a forward: tensors that a user's own engine has partitioned are gathered for it."""
        here = self.named(choice)
        if self._pool.waiting and self.base.device.type != "meta":
            for name in here:
                self.check_filled(name)
        rows = self._current.rows
        if rows is None or rows.adapters is None:
            for name in here:
                reach(self, self._current.run_with(self.tensors(name)).values())
        else:
            # Ranks may name others: all gather alike.
            for name in self.methods:
                reach(self, self.held(name).values())
        return here

    def given(
        self,
        adapter: str,
        rows: Rows | None = None,
        start: int = 0,
        stop: int | None = None,
        reads: Mapping[str, Tensor] | None = None,
    ) -> Params:
        """All that the functions of the adapter's method find in `p`: its tensors here, those that its layers
        share, and what it reads of the batch, cut to the rows start to stop of `rows` in sorted order; or `reads`
        in its place."""
        method, p = self.methods[adapter], self.held(adapter)
        if self._current.made is not None and makes(type(method)):
            p |= self._current.made.at(self._site_name, adapter, method)
        for name in method.reads:
            own = None if reads is None else reads.get(name)
            p[name] = self._read(name, method, rows, start, stop) if own is None else own
        if self.training and type(method).check_training is not Method.check_training:
            method.check_training(p, self.base.site)
        if self.training and type(method).draws is not Method.draws:
            for name, draw in method.draws(self.base.site).items():
                p[name] = self._drawn(adapter, name, draw, p, rows, start, stop)
        if type(method).gradient is not Method.gradient and torch.is_grad_enabled():
            p = {name: _projected(method, name, t, p) for name, t in p.items()}
        return p

    def held(self, adapter: str) -> dict[str, Any]:
        """The adapter's tensors here and those that its layers share, by the method's names."""
        return {**self.shared(adapter), **self._current.run_with(self.tensors(adapter))}

    def shared(self, adapter: str) -> dict[str, Tensor]:
        """The tensors that the layers of an adapter share, or that are borrowed here from one of them, by the
        method's own names."""
        tensors = self._current.run_with(self._shared(adapter))
        reach(self, tensors.values())
        return tensors

    def _shared(self, adapter: str) -> dict[str, Tensor]:
        if adapter in self._lenders:
            return self._lenders[adapter].tensors(adapter)
        common = self._commons.get(adapter, self._common)
        # A module that is trained whole beside an adapter shares nothing with its layers.
        shares = type(self.methods[adapter]).shared is not Method.shared
        return common.tensors(adapter) if common is not None and shares and common.has(adapter) else {}

    def _borrowed(self, attribute: str) -> nn.Module | None:
        """adapter -> what is trained at the layer to which this one is tied, where programs read it of both."""
        if attribute not in ("modules_to_save", "trainable_tokens_delta"):
            return None
        lenders = self.__dict__["_lenders"].values()
        return next((each._modules[attribute] for each in lenders if attribute in each._modules), None)

    def _held_in_common(self, key: str) -> nn.Module | None:
        """adapter -> the tensor that its layers share, where it hangs under this name."""
        for adapter in self.methods:
            common = self.__dict__["_commons"].get(adapter, self.__dict__["_common"])
            params = common.wanted(adapter).values() if common is not None else ()
            if any(param.key.partition(".")[0] == key for param in params):
                return common._modules[key]
        return None

    def _read(self, name: str, method: Method, rows: Rows | None, start: int, stop: int | None) -> Tensor:
        value = self._current.batch.get(name)
        if value is None:
            raise RowsError(
                f"{self._site_name}: {type(method).__name__} needs {name}, one entry per sequence. Pass "
                f"{name}=... to the model's forward or generate."
            )
        if rows is None or rows.num is None:
            return value
        if len(value) == 1:
            value = value.expand(rows.num, *value.shape[1:])
        if len(value) != rows.num:
            raise RowsError(
                f"{name} has {len(value)} entries for {rows.num} sequences. Give one per sequence."
            )
        return (value if rows.order is None else value[rows.order])[start:stop]

    def _drawn(
        self,
        adapter: str,
        name: str,
        draw: Draw,
        p: Params,
        rows: Rows | None,
        start: int,
        stop: int | None,
    ) -> Tensor:
        rows = rows or self._current.rows
        tensor = next(iter(p.values()))
        if rows is None or rows.samples is None:
            # What a method reads has an entry for each sequence.
            num = () if draw.each == "step" else (len(p[self.methods[adapter].reads[0]]),)
            return torch.rand(*num, *draw.shape, device=tensor.device)
        key = rows.stream_of(adapter, f"{self._site_name}.{name}")
        samples = rows.samples.to(tensor.device)
        if draw.each == "step":
            return uniform(draw.shape, samples.new_zeros(1), key)[0]
        return uniform(draw.shape, (samples if rows.order is None else samples[rows.order])[start:stop], key)


def bare(module: Any) -> Any:
    """A module beneath all wrappers."""
    return module.get_base_layer() if isinstance(module, AdapterModule) else module


def _projected(method: Method, name: str, tensor: Tensor, p: Params) -> Tensor:
    return _Projected.apply(tensor, method, name, p) if tensor.requires_grad else tensor


class _Projected(torch.autograd.Function):
    """A tensor as it is, whose gradient its method projects."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, method: Method, name: str, p: Params) -> Tensor:
        ctx.method, ctx.name, ctx.p = method, name, {key: t.detach() for key, t in p.items()}
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return ctx.method.gradient(ctx.name, gradient, ctx.p), None, None, None
