"""A layer with adapters on its weight, its input or its output."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_dist.adapted.entrance import Entrance, Framed, as_given, dtype_of, unchanged
from peft_dist.adapted.levels import Adjusted, Level, down, up
from peft_dist.adapted.module import AdapterModule
from peft_dist.adapted.packed import chosen, run_packed
from peft_dist.base_layer import Layer, door, rounded
from peft_dist.compiled import lane_loop
from peft_dist.contract import BaseLayer, Method, Params, SiteMethod, WeightMethod
from peft_dist.errors import RowsError
from peft_dist.packed_rows import PackedRows, Stretch
from peft_dist.pool import AdapterPool, Bucket
from peft_dist.pooled import PooledModule
from peft_dist.recompute import Remembering
from peft_dist.rows import Current, Rows, Segment, Split
from peft_dist.sharding import is_partitioned, reach


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
            if attribute in ("in_features", "out_features"):
                return self._features()[attribute == "out_features"]
            if attribute == "parameter_name" and self.base.site.kind == "experts":
                return self.base.key
            if found := self._facts(attribute):
                return found
            if (held := self._held_in_common(attribute)) is not None:
                return held
            if (held := self._borrowed(attribute)) is not None:
                return held
            if attribute != "adapter_layer_names" and attribute in self.adapter_layer_names:
                return {}
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
        if isinstance(rows, PackedRows) and not self.merged_adapters:
            return self._packed(args, kwargs, rows)
        if self.merged_adapters:
            if rows is not None and rows.adapters is not None:
                self.refuse_rows_while_merged()
            return self.base_layer(*args, **kwargs)
        if is_partitioned(self.base.parameter) and self._runs_within():
            again = self._runs_again if torch.is_grad_enabled() and self._is_large() else None
            return self.base.within(self.forward, args, kwargs, again)
        if self.base.is_argument:
            return self._as_argument(args, kwargs)
        if len(args) != 1 or kwargs:
            raise TypeError(f"{self._site_name}: an adapted layer takes its input alone.")
        (x,) = args
        if self._current.made is not None and (y := self._current.siblings.computed_for(self, x)) is not None:
            return y
        if rows is None or rows.num is None:
            return self._serve(self.serving(None), x)
        if rows.bins is not None and self._goes_by_sequence(rows):
            return self._apart(x, rows)
        if len(rows.segments) > 1 and (y := self._by_row(x, rows)) is not None:
            return y
        choices = [(self.serving(s.adapter), s.start, s.stop) for s in rows.segments]
        if all(names == choices[0][0] for names, _, _ in choices[1:]):
            names = choices[0][0] if choices else self.serving(None)
            if not names:
                return self.base(x)
            drops = self.training and any(self.methods[name].dropout for name in names)
            if rows.samples is None or not drops:
                return self._serve(names, x)
            if rows.bins is not None:
                return self._serve(names, x, rows.samples)
            split = rows.of(self.base.site, x, self._current.length)
            return split.restored(self._serve(names, split.x, rows.samples))
        split = rows.of(self.base.site, x, self._current.length)
        parts = [(self.levels(names, rows, start, stop), start, stop) for names, start, stop in choices]
        if all(isinstance(level.method, WeightMethod) for levels, _, _ in parts for level in levels):
            return self._mixed_weights(x, split, parts)
        return self._mixed(split, parts)

    def _goes_by_sequence(self, rows: Rows) -> bool:
        """Whether what serves must see each sequence by itself: adapters differ, or a method reads or draws something
        for each of them."""
        if len(rows.segments) > 1:
            return True
        choice = rows.segments[0].adapter if rows.segments else None
        return any(self.methods[name].reads for name in self.named(choice))

    def _apart(self, x: Tensor, rows: Rows) -> Tensor:
        """x, in which sequences share rows, run with a row for each."""
        assert rows.bins is not None
        current, bins = self._current, rows.bins
        split, before = rows.of(self.base.site, x, None), dataclasses.replace(current)
        current.rows, current.length, current.padding = rows.apart(), bins.longest, None
        current.batch = {
            name: bins.apart(value) if tuple(value.shape[:2]) == bins.shape else value
            for name, value in current.batch.items()
        }
        try:
            return split.restored(self.forward(split.x))
        finally:
            current.take(before)

    def _packed(self, args: tuple, kwargs: dict[str, Any], rows: PackedRows) -> Tensor:
        if self.base.is_argument:
            return self._packed_argument(args, kwargs, rows)
        if len(args) != 1 or kwargs:
            raise TypeError(f"{self._site_name}: an adapted layer takes its input alone.")
        return run_packed(self, args[0], rows)

    def _packed_argument(self, args: tuple, kwargs: dict[str, Any], rows: PackedRows) -> Any:
        """A packed row through a module that reads the weight by itself: once for each stretch that other adapters
        serve, with their weight in place."""
        parts, run = self._parts(), rows.tokens
        choices = []
        for stretch in run.stretches:
            blends = [chosen(part, stretch.choice) for part in parts]
            if any(weight != 1 for blend in blends for _, weight in blend):
                raise RowsError(
                    f"{self._site_name}: its weight is used as a function's argument, so what adapters add to it is "
                    "not weighted and summed there. Serve each alone."
                )
            choices.append([tuple(name for name, _ in blend) for blend in blends])
        if all(names == choices[0] for names in choices) and not (rows.alone and len(choices) > 1):
            return _substituted(parts, choices[0], args, kwargs)
        self.base.check_cut(args, kwargs, run.num)
        given = []
        for names, stretch in zip(choices, run.stretches, strict=True):
            own_args = tuple(_part_of(value, stretch) for value in args)
            own_kwargs = {key: _part_of(value, stretch) for key, value in kwargs.items()}
            given.append(_substituted(parts, names, own_args, own_kwargs))
        return run.joined(given, 0)

    def _as_argument(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A layer whose weight is used as a function's argument: it runs with the changed weight in place."""
        rows, parts = self._current.rows, self._parts()
        # On every rank, whichever of the parts its rows change.
        reach(self.base.layer, (p for part in parts for p in part.base.layer.parameters(recurse=False)))
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
            return self.base(x)
        entrance = Entrance(self, samples, names[0])
        if len(names) == 1:
            return self._through(names[0], entrance, x)
        levels = self.levels(names)
        inputs = down(levels, x)
        y = self.base(as_given(inputs[0], x))
        return up(levels, inputs, y, entrance)

    def _through(self, name: str, entrance: Entrance, x: Tensor) -> Tensor:
        """One adapter for all rows of x."""
        method, p = self.methods[name], self.given(name)
        if dtype_of(p, x) == x.dtype and not entrance.drops(method):
            joins = _joins(type(method))  # type: ignore[arg-type]
            if joins and (y := self._among_siblings(method, p, x)) is not None:
                return y
            return method.forward(p, self.base, x, unchanged)
        if dtype_of(p, x) == x.dtype:
            return method.forward(p, self.base, x, entrance.of(method, p))
        if not self.casts:
            p = {key: t.to(x.dtype) if t.is_floating_point() else t for key, t in p.items()}
            return method.forward(p, self.base, x, entrance.of(method, p))
        framed = Framed(self.base, x.dtype)
        return method.forward(p, framed, x, entrance.of(method, p)).to(framed.given)

    def _among_siblings(self, method: SiteMethod, p: Params, x: Tensor) -> Tensor | None:
        """What this layer gives, computed at once with the layers that take x next; None where there are none."""
        siblings, rows = self._current.siblings, self._current.rows
        # Between calls of layers by hand anything may change; within a whole model's forward nothing does.
        # A compiler joins them itself.
        if (
            self._current.made is None
            or torch.compiler.is_compiling()
            or self.base.is_running
            or (rows is not None and rows.num is not None and len(rows.segments) > 1)
        ):
            return None
        if not (followers := siblings.after(self, x)):
            return None
        choice = rows.segments[0].adapter if rows is not None and rows.segments else None
        alone = [other._served_alone(choice, x) for other in followers]
        if not all(one is not None and type(one[0]) is type(method) for one in alone):
            return None
        methods, ps = zip((method, p), *alone, strict=True)
        bases = [self.base, *(other.base for other in followers)]
        given = type(method).together(methods, ps, bases, x)
        if given is None:
            return None
        siblings.keep(dict(zip(followers, given[1:], strict=True)))
        return given[0]

    def _served_alone(self, choice: str | None, x: Tensor) -> tuple[SiteMethod, Params] | None:
        """The one adapter that serves x here as it is, neither cast nor dropped out."""
        if self.disabled or self.merged_adapters or len(names := self.serving(choice)) != 1:
            return None
        method, p = self.methods[names[0]], self.given(names[0])
        is_as_it_is = dtype_of(p, x) == x.dtype and not Entrance(self).drops(method)
        return (method, p) if is_as_it_is else None

    def _runs_within(self) -> bool:
        """Whether the adapters of a partitioned layer are still to be run within its own call, between the hooks that
        gather its weight: then every rank gathers it once, whatever the methods that its rows name read of it."""
        return not self.base.is_running and "forward" not in self.base.layer.__dict__

    def _is_large(self) -> bool:
        """Whether what serves would keep tensors of the weight's size until the backward."""
        rows = self._current.rows
        choices = (None,) if rows is None or rows.adapters is None else [s.adapter for s in rows.segments]
        for choice in choices:
            methods = [self.methods[name] for name in self.named(choice)]
            # An argument is the changed weight itself.
            if any(method.full_size for method in methods) or (methods and self.base.is_argument):
                return True
            if len(methods) > 1 and any(method.compose == "chain" for method in methods):
                return True
        return False

    def _runs_again(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs it now, and once more in the backward, for what the batch was."""
        again = functools.partial(checkpoint, use_reentrant=False)
        return Remembering(again, self._current)(run, *args, **kwargs)

    def _by_row(self, x: Tensor, rows: Rows) -> Tensor | None:
        """Each row beside its own adapter's tensors, in the batch's order: where all name one adapter each, of
        one method that runs so, and nothing is dropped; else None."""
        names, num = rows.adapters, x.shape[0]
        assert names is not None
        first, bucket = self.methods.get(names[0]), self._pool.bucket(self._site_name, names[0])  # type: ignore[arg-type]
        if self._current.joint is not None or bucket is None or not isinstance(first, WeightMethod):
            return None
        if num != len(names) or x.ndim < 3:
            return None
        # Many rows of few adapters with few positions each: then their tensors would be copied too often.
        if 2 * len(rows.segments) < num and x.numel() < num * bucket.size:
            return None
        if first.reads or (self.training and type(first).draws is not Method.draws):
            return None
        if (slots := bucket.slots_of(names)) is None:
            return None
        if self.training and any(self.methods[s.adapter].dropout for s in rows.segments):  # type: ignore[index]
            return None
        if (y := self._by_slot(x, names, bucket, slots)) is not None:
            return y
        parts = bucket.of_slots(slots)
        each = [self.methods[name] for name in names]  # type: ignore[index]
        method, given = type(first), x.to(dtype_of(parts[0][1])).unsqueeze(1)
        y, additions = None, []
        if not torch.is_grad_enabled() and method.adds_in_place(parts[0][1], self.base):
            y = self.base(x)
            if y.is_contiguous() and x.dtype == y.dtype == given.dtype:
                for part, p in parts:
                    method.add_mixed(each[part], p, self.base, given[part], y[part].unsqueeze(1))
                return y
        for part, p in parts:
            added = method.mixed(each[part], p, self.base, given[part])
            if added is None:
                return None
            additions.append(added.squeeze(1))
        y = self.base(x) if y is None else y
        return (torch.cat(additions) if len(parts) > 1 else additions[0]).add_(y).to(y.dtype)

    def _by_slot(
        self, x: Tensor, names: Sequence[str | None], bucket: Bucket, slots: tuple[int, ...]
    ) -> Tensor | None:
        """`_by_row` by one compiled loop over the arrays of the pool, where that is cheaper; else None."""
        if torch.is_grad_enabled() or not lane_loop.suits_rows(x):
            return None
        method: Any = type(self.methods[names[0]])  # type: ignore[index]
        distinct = dict.fromkeys(names)
        found = method.by_slot([self.methods[name] for name in distinct], bucket.arrays, self.base)  # type: ignore[index]
        if found is None:
            return None
        A, B, scales = found
        if not lane_loop.takes(A, B, x):
            return None
        given = self.base(x)
        y = given.to(x.dtype).contiguous()
        scale_of = dict(zip(distinct, scales, strict=True))
        served = lane_loop.served_by_row(
            slots, tuple([scale_of[name] for name in names]), x.shape[:-1].numel()
        )
        lane_loop.add(A, B, (A.shape[2], B.shape[1], A.shape[1]), served, x, y, across=True)
        return y.to(given.dtype)

    def _mixed_weights(self, x: Tensor, split: Split, parts: list[tuple[list[Level], int, int]]) -> Tensor:
        """Rows name different adapters, all of which add to W: the layer runs once, the additions part by
        part."""
        y = self.base(x)
        if split.rows.num != x.shape[0] and split.length is None:
            y = y.expand(split.x.shape[0], *y.shape[1:])
        xs = split.sorted(split.x)
        samples = split.rows.samples
        entrances = [
            Entrance(self, None if samples is None else split.sorted(samples)[start:stop], _first(levels))
            for levels, start, stop in parts
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

    def _stacked(self, xs: Tensor, parts: list, entrances: list[Entrance]) -> Tensor | None:
        """The additions of all parts by one product over stacked tensors, where the parts are alike; else
        None."""
        if self._current.joint is not None:
            return None
        num_rows = parts[0][2] - parts[0][1]
        if any(len(levels) != 1 or stop - start != num_rows for levels, start, stop in parts):
            return None
        levels = [levels[0] for levels, _, _ in parts]
        buckets = {id(self._pool.bucket(self._site_name, level.name)) for level in levels}
        if (
            len(buckets) != 1
            or id(None) in buckets
            or (self.training and type(levels[0].method).draws is not Method.draws)
        ):
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
        inputs = [down(levels, xs[start:stop]) for levels, start, stop in parts]
        y = self.base(
            split.restored(split.unsorted(torch.cat([as_given(lowest[0], xs) for lowest in inputs])))
        )
        ys = split.sorted(y if split.length is None else y.unflatten(0, (-1, split.length)))
        given = []
        for (levels, start, stop), part_inputs in zip(parts, inputs, strict=True):
            mine = None if samples is None else split.sorted(samples)[start:stop]
            entrance = Entrance(self, mine, _first(levels))
            given.append(up(levels, part_inputs, ys[start:stop], entrance))
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
        return parts[0].base(*args, **kwargs)


def _first(levels: Sequence[Level]) -> str | None:
    return levels[0].name if levels else None


def _part_of(value: Any, stretch: Stretch) -> Any:
    """A tensor of tokens (T, ...) cut to a stretch; anything else as it is."""
    return value[stretch.start : stretch.stop] if isinstance(value, Tensor) else value


@functools.cache
def _joins(method: type[SiteMethod]) -> bool:
    """Whether `together` is this class's own, and not that of one whose `forward` it replaces."""
    for cls in method.__mro__:
        if "together" in vars(cls):
            return cls is not SiteMethod
        if "forward" in vars(cls):
            return False
    return False
