"""The modules around a base's layers: they pick the adapters that serve, cast at the border, drop out, and
run batches in which rows name different adapters. Storage, mathematics and layer kinds are elsewhere.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from peft_dist.base_layer import Layer, door, rounded
from peft_dist.contract import (
    ActivationMethod,
    BaseLayer,
    BlockMethod,
    Draw,
    Method,
    Params,
    SiteMethod,
    WeightMethod,
)
from peft_dist.errors import AdapterError, RowsError
from peft_dist.layer_api import LayerApi
from peft_dist.pool import AdapterPool, PooledModule
from peft_dist.rows import BASE, Current, Cut, Rows, Segment, Split, drop, stream, uniform
from peft_dist.sharding import is_partitioned, reach, whole_shape


class AdapterModule(LayerApi, PooledModule):
    """What the wrappers below share: whose adapters are here, and which serve.

    Attributes:
        methods: adapter -> its method here.
        active_adapters: the names that serve rows which name none; also names that have nothing here.
        disabled: whether the bare base serves.
        merged_adapters: the names whose change is in the base's weights now, in the order they were merged.
    """

    base: Layer
    _common: PooledModule | None
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
        # Adapter -> the module whose tensors serve here too.
        self.__dict__["_lenders"] = {}

    def add(self, adapter: str, method: Method, layer: Layer, dtype: torch.dtype, device: Any) -> None:
        """Makes room for an adapter's tensors, unfilled."""
        self.hold(adapter, type(method).__name__, method.params(layer.site), dtype, device)  # type: ignore[attr-defined]
        self.methods[adapter] = method

    def borrow(self, adapter: str, method: Method, lender: AdapterModule) -> None:
        """Lets an adapter act here by its tensors at `lender`, whose layer shares this one's weight."""
        self.hold(adapter, type(method).__name__, {}, torch.float32, "cpu")
        self.methods[adapter] = method
        self._lenders[adapter] = lender

    def start(self, adapter: str, layer: Layer) -> None:
        """Fills an adapter's tensors; a collective where its method reads a partitioned weight."""
        self._start(adapter, {name: t.detach() for name, t in self.tensors(adapter).items()}, layer)
        self.replace_base(adapter, layer)

    def replace_base(self, adapter: str, layer: Layer) -> None:
        """Lets the adapter's method change the layer, where it does."""
        method = self.methods[adapter]
        if type(method).replace_base is not Method.replace_base:
            p = self.tensors(adapter)
            if not any(t.is_meta for t in p.values()):
                with torch.no_grad():
                    method.replace_base(p, layer)

    def complete(self, adapter: str, missing: Sequence[str], layer: Layer) -> None:
        """Fills the named tensors alone, as `start` would: a checkpoint lacked them."""
        made = {name: torch.empty_like(t) for name, t in self.tensors(adapter).items()}
        self._start(adapter, made, layer)
        for name in missing:
            self.tensors(adapter)[name].detach().copy_(made[name])

    def _start(self, adapter: str, own: dict[str, Tensor], layer: Layer) -> None:
        with torch.no_grad():
            for name, param in self.wanted(adapter).items():
                if not own[name].is_meta:
                    param.start(own[name])
            p = {**self.shared(adapter), **own}
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
        self.active_adapters = [name for name in self.active_adapters if name != adapter]

    def serving(self, choice: str | None) -> tuple[str, ...]:
        """The adapters here that serve rows with this choice: a name, `"__base__"`, or None for the active
        ones. Within a forward: tensors that a user's own engine has partitioned are gathered for it."""
        names = self.active_adapters if choice is None else () if choice == BASE else (choice,)
        here = tuple(name for name in names if name in self.methods)
        for name in here:
            reach(self, self.tensors(name).values())
        return here

    def given(
        self, adapter: str, rows: Rows | None = None, start: int = 0, stop: int | None = None
    ) -> Params:
        """All that the functions of the adapter's method find in `p`: its tensors here, those that its layers
        share, and what it reads of the batch, cut to the rows start to stop of `rows` in sorted order."""
        method, p = self.methods[adapter], self.held(adapter)
        for name in method.reads:
            p[name] = self._read(name, method, rows, start, stop)
        if self.training and type(method).check_training is not Method.check_training:
            method.check_training(p, self.base.site)
        if self.training and type(method).draws is not Method.draws:
            for name, draw in method.draws(self.base.site).items():
                p[name] = self._drawn(name, draw, method, p, rows, start, stop)
        if type(method).gradient is not Method.gradient and torch.is_grad_enabled():
            p = {name: _projected(method, name, t, p) for name, t in p.items()}
        return p

    def held(self, adapter: str) -> dict[str, Any]:
        """The adapter's tensors here and those that its layers share, by the method's names."""
        return {**self.shared(adapter), **self.tensors(adapter)}

    def shared(self, adapter: str) -> dict[str, Tensor]:
        """The tensors that the layers of an adapter share, or that are borrowed here from one of them, by the
        method's own names."""
        if adapter in self._lenders:
            lent = self._lenders[adapter].tensors(adapter)
            reach(self, lent.values())
            return lent
        common = self._common
        # A module that is trained whole beside an adapter shares nothing with its layers.
        shares = type(self.methods[adapter]).shared is not Method.shared
        if common is None or not shares or not common.has(adapter):
            return {}
        tensors = common.tensors(adapter)
        reach(self, tensors.values())
        return tensors

    def _held_in_common(self, key: str) -> nn.Module | None:
        """adapter -> the tensor that its layers share, where it hangs under this name."""
        common = self.__dict__["_common"]
        wanted = (common.wanted(adapter) for adapter in self.methods) if common is not None else ()
        keys = {param.key.partition(".")[0] for params in wanted for param in params.values()}
        return common._modules[key] if key in keys else None

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
        name: str,
        draw: Draw,
        method: Method,
        p: Params,
        rows: Rows | None,
        start: int,
        stop: int | None,
    ) -> Tensor:
        rows = rows or self._current.rows
        tensor = next(iter(p.values()))
        if rows is None or rows.samples is None:
            # What a method reads has an entry for each sequence.
            num = () if draw.each == "step" else (len(p[method.reads[0]]),)
            return torch.rand(*num, *draw.shape, device=tensor.device)
        key = stream(rows.seed, rows.step, f"{self._site_name}.{name}")
        samples = rows.samples.to(tensor.device)
        if draw.each == "step":
            return uniform(draw.shape, samples.new_zeros(1), key)[0]
        return uniform(draw.shape, (samples if rows.order is None else samples[rows.order])[start:stop], key)


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


@dataclass(frozen=True)
class Level:
    """One adapter of several on a layer: it sees `under`, the layer as those before it left it."""

    name: str
    method: SiteMethod
    p: Params
    under: BaseLayer


class Adjusted:
    """A layer with the changes of some levels in its weight and bias; all else is the layer's own."""

    def __init__(self, base: Layer, levels: Sequence[Level]) -> None:
        self._base, self._levels = base, tuple(levels)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._base, attribute)

    def __call__(self, x: Tensor) -> Tensor:
        return self._base(x)

    def weight(self) -> Tensor:
        W = self._base.weight()
        for level in self._levels:
            W = self._base.plus(W, level.method.delta(level.p, level.under))
        return W

    def bias(self) -> Tensor | None:
        b = self._base.bias()
        for level in self._levels:
            db = level.method.bias_delta(level.p, level.under)
            b = db if b is None else b if db is None else b + db
        return b


class Adapted(AdapterModule):
    """A layer with adapters on it. Not merged, disabled or named otherwise: the active adapters serve.

    Attributes:
        base_layer: the frozen layer. base: its door.
        casts: whether inputs are cast to the adapters' dtype; false where hooks of another library do it.
    """

    casts = True

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        pool: AdapterPool,
        current: Current,
        base: Layer | None = None,
        common: PooledModule | None = None,
    ):
        super().__init__(pool, name, current, common)
        self.base_layer: Any = layer
        self.base = base or door(layer, name)
        self.base.adopt()

    @property
    def weight(self) -> Tensor:
        """The frozen layer's own weight, as programs read it from any linear layer."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's own bias."""
        return self.base_layer.bias

    def __getattr__(self, attribute: str) -> Any:
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            # in_features, num_embeddings and the like: models read them from their layers.
            layer = super().__getattr__("base_layer")
            if hasattr(layer, attribute) or attribute.startswith("_"):
                return getattr(layer, attribute)
            if found := self._facts(attribute):
                return found
            if (held := self._held_in_common(attribute)) is not None:
                return held
            return getattr(layer, attribute)

    def levels(
        self, names: Sequence[str], rows: Rows | None = None, start: int = 0, stop: int | None = None
    ) -> list[Level]:
        """The named adapters, in order, each with the layer that it changes. Neighbours of kind "add" change
        the same layer; the rest change what the ones before left. `rows` from start to stop are what they
        serve."""
        levels: list[Level] = []
        under: BaseLayer = self.base
        for name in names:
            method = self.methods[name]
            if levels and not (method.compose == levels[-1].method.compose == "add"):
                under = Adjusted(self.base, levels)
            levels.append(Level(name, method, self.given(name, rows, start, stop), under))
        return levels

    def change(self, names: Sequence[str]) -> tuple[Tensor | None, Tensor | None]:
        """(dW (out, in), db (out,)) of the named adapters together; None for what they leave as it is. A
        collective where a method reads a partitioned weight. Adapters that have nothing here count as no
        change."""
        dW = db = None
        with torch.no_grad():
            for level in self.levels([name for name in names if name in self.methods]):
                if self.base.site.in_:
                    change = level.method.delta(level.p, level.under)
                    dW = change if dW is None else self.base.plus(dW, change)
                bias_change = level.method.bias_delta(level.p, level.under)
                if bias_change is not None:
                    db = bias_change if db is None else db + bias_change
        return dW, db

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = self._current.rows
        if self.disabled:
            return self.base_layer(*args, **kwargs)
        if self.merged_adapters:
            if rows is not None and rows.adapters is not None:
                raise RowsError(
                    f"{self._site_name}: {self.merged_adapters} are merged. Unmerge to name adapters per row."
                )
            return self.base_layer(*args, **kwargs)
        if self.base.is_argument:
            return self._as_argument(args, kwargs)
        if len(args) != 1 or kwargs:
            raise TypeError(f"{self._site_name}: an adapted layer takes its input alone.")
        (x,) = args
        if rows is None or rows.num is None:
            return self._serve(self.serving(None), x)
        if len(rows.segments) > 1 and (y := self._by_row(x, rows)) is not None:
            return y
        choices = [(self.serving(s.adapter), s.start, s.stop) for s in rows.segments]
        if all(names == choices[0][0] for names, _, _ in choices[1:]):
            names = choices[0][0] if choices else self.serving(None)
            if not names:
                return self.base_layer(x)
            drops = self.training and any(self.methods[name].dropout for name in names)
            if rows.samples is None or not drops:
                return self._serve(names, x)
            split = rows.of(self.base.site, x, self._current.length)
            return split.restored(self._serve(names, split.x, rows.samples))
        split = rows.of(self.base.site, x, self._current.length)
        parts = [(self.levels(names, rows, start, stop), start, stop) for names, start, stop in choices]
        if all(isinstance(level.method, WeightMethod) for levels, _, _ in parts for level in levels):
            return self._mixed_weights(x, split, parts)
        return self._mixed(split, parts)

    def _as_argument(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A layer whose weight is used as a function's argument: it runs with the changed weight in place."""
        rows, parts = self._current.rows, self._parts()
        if rows is None or rows.adapters is None:
            return _substituted(parts, [part.serving(None) for part in parts], args, kwargs)
        choices = [([part.serving(s.adapter) for part in parts], s) for s in rows.segments]
        if all(names == choices[0][0] for names, _ in choices):
            return _substituted(parts, choices[0][0], args, kwargs)
        cut = self.base.cut(rows, self._current.length)
        given = []
        for names, segment in choices:
            own_args, own_kwargs = cut.of((args, kwargs), segment)
            given.append(_substituted(parts, names, own_args, own_kwargs, rows, segment))
        return cut.joined(given)

    def _parts(self) -> list[Adapted]:
        """This one and those that run in the same call: of other parameters of the module, and of layers in
        it whose weights it reads without calling them."""
        parts = [self]
        while isinstance(parts[-1].base_layer, Adapted):
            parts.append(parts[-1].base_layer)
        if self.base.site.kind == "mha":
            parts += [child for child in self.base.layer.children() if isinstance(child, Adapted)]
        return parts

    def _serve(self, names: tuple[str, ...], x: Tensor, samples: Tensor | None = None) -> Tensor:
        """One choice of adapters for all rows of x."""
        if not names:
            return self.base_layer(x)
        entrance = _Entrance(self, samples)
        if len(names) == 1:
            method, p = self.methods[names[0]], self.given(names[0])
            if _dtype_of(p, x) == x.dtype and not entrance.drops(method):
                return method.forward(p, self.base, x, _unchanged)
            if _dtype_of(p, x) == x.dtype or not self.casts:
                return method.forward(p, self.base, x, entrance.of(method, p))
            framed = _Framed(self.base, x.dtype)
            return method.forward(p, framed, x, entrance.of(method, p)).to(framed.given)
        levels = self.levels(names)
        inputs = _down(levels, x)
        y = self.base_layer(_as_given(inputs[0], x))
        return _up(levels, inputs, y, entrance)

    def _by_row(self, x: Tensor, rows: Rows) -> Tensor | None:
        """Each row beside its own adapter's tensors, in the batch's order: where all name one adapter each, of
        one method that runs so, and nothing is dropped; else None."""
        names, num = rows.adapters, x.shape[0]
        assert names is not None
        first, bucket = self.methods.get(names[0]), self._pool.bucket(self._site_name, names[0])  # type: ignore[arg-type]
        if bucket is None or not isinstance(first, WeightMethod) or num != len(names) or x.ndim < 3:
            return None
        # Many rows of few adapters with few positions each: then their tensors would be copied too often.
        if 2 * len(rows.segments) < num and x.numel() < num * bucket.size:
            return None
        if first.reads or (self.training and type(first).draws is not Method.draws):
            return None
        p = bucket.by_row(names)
        if p is None or (self.training and any(self.methods[s.adapter].dropout for s in rows.segments)):
            return None
        each = [self.methods[name] for name in names]
        added = type(first).mixed(each, p, self.base, x.to(_dtype_of(p)).unsqueeze(1))
        if added is None:
            return None
        y = self.base(x)
        return added.squeeze(1).add_(y).to(y.dtype)

    def _mixed_weights(self, x: Tensor, split: Split, parts: list[tuple[list[Level], int, int]]) -> Tensor:
        """Rows name different adapters, all of which add to W: the layer runs once, the additions part by
        part."""
        y = self.base_layer(x)
        if split.rows.num != x.shape[0] and split.length is None:
            y = y.expand(split.x.shape[0], *y.shape[1:])
        xs = split.sorted(split.x)
        samples = split.rows.samples
        entrances = [
            _Entrance(self, None if samples is None else split.sorted(samples)[start:stop])
            for _, start, stop in parts
        ]
        added = self._stacked(xs, parts, entrances)
        if added is None:
            pieces = []
            for (levels, start, stop), entrance in zip(parts, entrances, strict=True):
                piece = None
                for level in levels:
                    entered = entrance.of(level.method, level.p)(xs[start:stop])
                    part = level.method.added(level.p, level.under, entered)  # type: ignore[attr-defined]
                    piece = part if piece is None else piece + part
                pieces.append(piece)
            # One row of what the layer gives; a piece may be one vector for all positions.
            one = y.shape[1:] if split.length is None else (split.length, *y.shape[1:])
            added = torch.cat(
                [
                    (y.new_zeros(()) if piece is None else piece).expand(stop - start, *one)
                    for piece, (_, start, stop) in zip(pieces, parts, strict=True)
                ]
            )
        return (y + split.restored(split.unsorted(added))).to(y.dtype)

    def _stacked(self, xs: Tensor, parts: list, entrances: list[_Entrance]) -> Tensor | None:
        """The additions of all parts by one product over stacked tensors, where the parts are alike; else
        None."""
        num_rows = parts[0][2] - parts[0][1]
        if any(len(levels) != 1 or stop - start != num_rows for levels, start, stop in parts):
            return None
        levels = [levels[0] for levels, _, _ in parts]
        buckets = {id(self._pool.bucket(self._site_name, level.name)) for level in levels}
        if len(buckets) != 1 or (self.training and type(levels[0].method).draws is not Method.draws):
            return None
        # In the order of their slots, neighbours are read without a copy.
        bucket = self._pool.homes[self._site_name, levels[0].name]
        p = bucket.stacked([level.name for level in levels])
        entered = (
            [
                entrance.of(level.method, level.p)(xs[start:stop])
                for level, entrance, (_, start, stop) in zip(levels, entrances, parts, strict=True)
            ]
            if any(e.drops(level.method) for e, level in zip(entrances, levels, strict=True))
            else None
        )
        whole = torch.cat(entered) if entered else entrances[0].of(levels[0].method, levels[0].p)(xs)
        methods = [level.method for level in levels]
        added = type(methods[0]).mixed(methods, p, self.base, whole.unflatten(0, (len(parts), num_rows)))  # type: ignore[attr-defined]
        return None if added is None else added.flatten(0, 1)

    def _mixed(self, split: Split, parts: list[tuple[list[Level], int, int]]) -> Tensor:
        """Rows name different adapters of any kind: each part goes down through its levels, the layer runs
        once on all (ranks that name different adapters must gather its weight equally often), each part goes
        up again."""
        xs, samples = split.sorted(split.x), split.rows.samples
        inputs = [_down(levels, xs[start:stop]) for levels, start, stop in parts]
        y = self.base_layer(
            split.restored(split.unsorted(torch.cat([_as_given(lowest[0], xs) for lowest in inputs])))
        )
        ys = split.sorted(y if split.length is None else y.unflatten(0, (-1, split.length)))
        given = []
        for (levels, start, stop), part_inputs in zip(parts, inputs, strict=True):
            entrance = _Entrance(self, None if samples is None else split.sorted(samples)[start:stop])
            given.append(_up(levels, part_inputs, ys[start:stop], entrance))
        return split.restored(split.unsorted(torch.cat(given)))


def _substituted(
    parts: Sequence[Adapted],
    names: Sequence[tuple[str, ...]],
    args: tuple,
    kwargs: dict[str, Any],
    rows: Rows | None = None,
    segment: Segment | None = None,
) -> Any:
    """What the module of all parts gives while each has the named adapters in its weight."""
    where = (segment.start, segment.stop) if segment is not None else (0, None)
    with contextlib.ExitStack() as stack:
        for part, here in zip(parts, names, strict=True):
            if here:
                changed = Adjusted(part.base, part.levels(here, rows, *where))
                dtype = part.base.dtype
                bias = changed.bias()
                W = rounded(changed.weight(), dtype)
                stack.enter_context(part.base.substituted(W, bias if bias is None else bias.to(dtype)))
        return parts[0].base.layer(*args, **kwargs)


class _Entrance:
    """How x enters an adapter's branch of a module: in the adapter's dtype, dropped out while training."""

    def __init__(self, module: Adapted, samples: Tensor | None = None) -> None:
        self.module, self.samples = module, samples

    def drops(self, method: SiteMethod) -> bool:
        return self.module.training and method.dropout > 0

    def of(self, method: SiteMethod, p: Params) -> Callable[[Tensor], Tensor]:
        dtype = _dtype_of(p)
        casts = self.module.casts

        def enter(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            x = x.to(dtype) if casts else x
            if not self.drops(method):
                return x
            if self.samples is None:
                return F.dropout(x, method.dropout)
            rows = self.module._current.rows
            assert rows is not None
            key = stream(rows.seed, rows.step, self.module._site_name)
            padding = self.module._current.padding_of(self.samples)
            return drop(x, method.dropout, self.samples, key, padding)

        return enter


def _unchanged(x: Tensor) -> Tensor:
    """x as the branch of an adapter of its dtype takes it where nothing is dropped."""
    return x


def _dtype_of(p: Params, x: Tensor | None = None) -> torch.dtype:
    """The dtype that an adapter computes in."""
    for t in p.values():
        if t.is_floating_point():
            return t.dtype
    return torch.float32 if x is None else x.dtype


class _Framed:
    """A layer behind adapters of another dtype: takes what it is given in its own, and remembers what it
    gives."""

    def __init__(self, base: Layer, taken: torch.dtype) -> None:
        self._base, self._taken = base, taken
        self.given = taken

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._base, attribute)

    def __call__(self, x: Tensor) -> Tensor:
        y = self._base(x.to(self._taken))
        self.given = y.dtype
        return y


def _as_given(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


def _down(levels: list[Level], x: Tensor) -> list[Tensor]:
    """What each level takes, the lowest first, and below it what the layer takes: levels + 1 tensors."""
    inputs = [x]
    for level in reversed(levels):
        if isinstance(level.method, ActivationMethod):
            x = level.method.before(level.p, level.under, x)
        inputs.append(x)
    return inputs[::-1]


def _up(levels: list[Level], inputs: list[Tensor], y: Tensor, entrance: _Entrance) -> Tensor:
    """What the adapted layer gives, from y, what the layer gave, in y's dtype."""
    given = y.dtype
    for level, x in zip(levels, inputs[1:], strict=True):
        if isinstance(level.method, ActivationMethod):
            y = level.method.after(level.p, level.under, y)
        else:
            y = y + level.method.added(level.p, level.under, entrance.of(level.method, level.p)(x))  # type: ignore[attr-defined]
    return y.to(given)


class Replaced(AdapterModule):
    """A module that adapters replace by tensors of their own: `modules_to_save`.

    Attributes:
        original_module: the frozen module. base: its door.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        pool: AdapterPool,
        current: Current,
        base: Layer | None = None,
        common: PooledModule | None = None,
    ) -> None:
        super().__init__(pool, name, current, common)
        self.original_module: Any = module
        self.base = base or Layer(module, name)
        # A copy without memory and without an engine's hooks, into which an adapter's tensors are put to run
        # it.
        self.__dict__["_shell"] = _shell(module)

    def __getattr__(self, attribute: str) -> Any:
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            return getattr(super().__getattr__("original_module"), attribute)

    @property
    def base_layer(self) -> nn.Module:
        """The frozen module, under the name that `Adapted` gives it."""
        return self.original_module

    def train(self, mode: bool = True) -> Replaced:
        self._shell.train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = self._current.rows
        if self.disabled:
            return self.original_module(*args, **kwargs)
        if rows is None or rows.adapters is None:
            return self._run(self.serving(None), args, kwargs)
        choices = [(self.serving(s.adapter), s.start, s.stop) for s in rows.segments]
        if len(choices) == 1:
            y = self._run(choices[0][0], args, kwargs)
            if choices[0][0] and self._is_apart() and isinstance(y, Tensor):
                y = _Beside.apply(y, self.original_module(*args, **kwargs))
            return y
        return self._mixed(rows, choices, args, kwargs)

    def _is_apart(self) -> bool:
        """Whether the frozen module is partitioned. Then each rank runs it, forward and backward, whether or
        not its rows use it: ranks that name different adapters must gather its weight equally often."""
        return any(is_partitioned(t) for t in self.original_module.parameters())

    def _run(self, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> Any:
        if not names:
            return self.original_module(*args, **kwargs)
        p = self.held(names[-1])
        dtype = next(iter(p.values())).dtype
        wanted = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        y = self._called(p, tuple(wanted), kwargs)
        cast = any(mine is not given for mine, given in zip(wanted, args, strict=True))
        return y.to(args[0].dtype) if cast and isinstance(y, Tensor) else y

    def _called(self, p: Params, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the module gives with the tensors p in the place of its own."""
        shell: Any = self._shell
        own = shell._parameters
        if (
            shell._modules
            or shell._buffers
            or any(own[name] is None for name in p)
            or torch.compiler.is_compiling()
        ):
            buffers = dict(self.base.layer.named_buffers())
            return functional_call(shell, {**buffers, **p}, args, kwargs)
        # A norm, most often: nothing to look for below it.
        empty = dict(own)
        own.update(p)
        try:
            return shell(*args, **kwargs)
        finally:
            own.update(empty)

    def _mixed(self, rows: Rows, choices: list, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if len(args) != 1 or kwargs:
            raise RowsError(
                f"{self._site_name}: rows can name different adapters only where a module takes one input."
            )
        split = rows.of(self.base.site, args[0], self._current.length)
        xs = split.sorted(split.x)
        apart = self._is_apart()
        bare = (
            split.sorted(self.original_module(split.x))
            if apart or any(not n for n, _, _ in choices)
            else None
        )
        pieces = [
            self._run(names, (xs[start:stop],), {}) if names else bare[start:stop]  # type: ignore[index]
            for names, start, stop in choices
        ]
        given = torch.cat(pieces)
        if apart:
            given = _Beside.apply(given, bare)
        return split.restored(split.unsorted(given))


class AdaptedBlock(AdapterModule):
    """A whole block of the base to whose output adapters add: an attention module, a decoder layer.

    Attributes:
        original_module: the frozen block. base: its door.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        pool: AdapterPool,
        current: Current,
        base: Layer | None = None,
        common: PooledModule | None = None,
    ) -> None:
        super().__init__(pool, name, current, common)
        self.original_module: Any = module
        self.base = base or Layer(module, name)

    def __getattr__(self, attribute: str) -> Any:
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            return getattr(super().__getattr__("original_module"), attribute)

    @property
    def base_layer(self) -> nn.Module:
        """The frozen block, under the name that `Adapted` gives it."""
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original_module(*args, **kwargs)
        rows = self._current.rows
        if self.disabled:
            return output
        choices = [] if rows is None else [(self.serving(s.adapter), s) for s in rows.segments]
        used = {name for names, _ in choices for name in names}
        if all(names == choices[0][0] for names, _ in choices):
            names = choices[0][0] if choices else self.serving(None)
            given = self._around(names, output, args, kwargs)
        else:
            assert rows is not None
            cut = Cut(rows, self.base.site, self._current.length)
            given = cut.joined(
                [self._around(names, *cut.of((output, args, kwargs), s), rows, s) for names, s in choices]
            )
        if choices and any(is_partitioned(t) for t in self.original_module.parameters()):
            # A method may run parts of the block: ranks that name different adapters must gather their weights
            # equally often.
            for name in self.adapters:
                if name not in used:
                    given = _beside(given, self._around((name,), output, args, kwargs))
        return given

    def _around(
        self,
        names: Sequence[str],
        output: Any,
        args: tuple,
        kwargs: Mapping[str, Any],
        rows: Rows | None = None,
        segment: Segment | None = None,
    ) -> Any:
        for name in names:
            method: BlockMethod = self.methods[name]
            where = (segment.start, segment.stop) if segment is not None else (0, None)
            output = method.around(self.given(name, rows, *where), self.original_module, output, args, kwargs)
        return output


def _beside(given: Any, other: Any) -> Any:
    """`given` as it is; the backward also goes through `other`, with a gradient of zero."""
    if isinstance(given, Tensor):
        return _Beside.apply(given, other)
    return type(given)((_beside(given[0], other[0]), *given[1:]))


class _Beside(torch.autograd.Function):
    """y as it is; the backward also goes through what made `bare`, with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bare: Tensor) -> Tensor:
        ctx.shape = bare.shape
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, gradient.new_zeros(ctx.shape)


def _shell(module: nn.Module) -> nn.Module:
    empty = {
        id(p): nn.Parameter(torch.empty(whole_shape(p), dtype=p.dtype, device="meta"), requires_grad=False)
        for p in module.parameters()
    }
    shell = copy.deepcopy(module, memo=dict(empty))
    for part in shell.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        part._backward_hooks.clear()
        part._backward_pre_hooks.clear()
    return shell
