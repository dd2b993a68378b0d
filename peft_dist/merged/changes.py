"""What adapters do to each tensor of their base, by the tensor's name in the bare base.

One path for a base whose tensors are in memory, in pieces on several ranks, or put in its place one by one:
`Adapted.change` gives what is added, the layer's door the weight that it is added to, and nothing is changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist.adapted import Adapted, AdapterModule, Replaced
from peft_dist.base_layer import door
from peft_dist.errors import MergeError
from peft_dist.merged.shards import PIECE_BYTES
from peft_dist.packed import is_quantised
from peft_dist.sharding import gathered, whole, whole_shape


@dataclass(frozen=True)
class Place:
    """Where a tensor hangs in a base with wrappers.

    Args:
        module: the base's own module that holds it, under `leaf`.
        wrappers: those around it, each with the tensor's name within the module that it wraps.
    """

    module: nn.Module
    leaf: str
    wrappers: tuple[tuple[AdapterModule, str], ...]

    @property
    def tensor(self) -> Any:
        """As it is stored."""
        held = self.module._parameters.get(self.leaf)
        return self.module._buffers[self.leaf] if held is None else held


def place_of(base: nn.Module, key: str) -> Place | None:
    """Where the tensor called `key` in the bare base hangs; None where it has none."""
    *path, leaf = key.split(".")
    module, found = base, []
    for number, part in enumerate([*path, ""]):
        while isinstance(module, AdapterModule):
            found.append((module, ".".join([*path[number:], leaf])))
            module = module.base_layer
        if not part:
            break
        inner = module._modules.get(part)
        if inner is None:
            return None
        module = inner
    if module._parameters.get(leaf) is None and module._buffers.get(leaf) is None:
        return None
    return Place(module, leaf, tuple(found))


@dataclass(frozen=True)
class Change:
    """What is done to one tensor: `wrapper` adds to it, or puts its adapter's own in its place.

    Args:
        part: `weight` or `bias` of an `Adapted`; the tensor's own name in a `Replaced`.
        names: the adapters that act here, in order.
    """

    wrapper: Any
    part: str
    names: tuple[str, ...]

    @property
    def replaces(self) -> bool:
        """Whether nothing of the base's own is left."""
        return isinstance(self.wrapper, Replaced)

    def source(self, name: str) -> Any:
        """The wrapper whose tensors an adapter acts by here."""
        return self.wrapper._lenders.get(name, self.wrapper)

    def is_same(self, other: Change | None) -> bool:
        """Whether both are done by the same tensors: then what was tied before is equal after."""
        return (
            other is not None
            and self.names == other.names
            and all(self.source(name) is other.source(name) for name in self.names)
        )


def change_of(place: Place, names: Sequence[str]) -> Change | None:
    """What the named adapters do to the tensor there; None where they leave it as it is.

    Raises:
        MergeError: other adapters are in the base's weights already.
    """
    found = None
    for wrapper, rest in place.wrappers:
        here = tuple(name for name in names if name in wrapper.methods)
        if isinstance(wrapper, Replaced):
            # The last of them stands in the module's place.
            held = [name for name in here if rest in wrapper.held(name)]
            if held:
                return Change(wrapper, rest, (held[-1],))
        if not isinstance(wrapper, Adapted):
            continue
        if wrapper.merged_adapters:
            _check_merged(wrapper, names)
            continue
        if here and rest == wrapper.base.key and wrapper.base.site.in_:
            found = Change(wrapper, "weight", here)
        elif here and rest == wrapper.base.bias_key and wrapper.base.site.bias:
            found = Change(wrapper, "bias", here)
    return found


def _check_merged(wrapper: Adapted, names: Sequence[str]) -> None:
    if list(wrapper.merged_adapters) != list(names):
        raise MergeError(
            f"{wrapper._site_name}: {', '.join(wrapper.merged_adapters)} are merged into the base now, and "
            f"{', '.join(names)} are to be. Call unmerge_adapter first."
        )


def check_biases(wrappers: Iterable[Any], names: Sequence[str]) -> None:
    """Raises MergeError where an adapter adds to the bias of a layer that has none."""
    for wrapper in wrappers:
        for name in names if not wrapper.base.site.bias else ():
            keys = [param.key for param in wrapper.wanted(name).values()]
            if isinstance(wrapper, Adapted) and any(key.rpartition(".")[2].endswith("bias") for key in keys):
                raise _no_bias(wrapper, name)


def _no_bias(wrapper: Any, name: str) -> MergeError:
    return MergeError(
        f"{wrapper._site_name}: adapter {name!r} adds to a bias, and this layer has none. Keep the adapter."
    )


class Value:
    """A merged tensor in the form that is stored, made piece by piece.

    Args:
        stored: the base's, whole. change: what is added, of the same form; None for nothing.
        dtype: of what is made.
        where: the tensor's name, for errors.
    """

    def __init__(self, stored: Tensor, change: Tensor | None, dtype: torch.dtype, where: str) -> None:
        self._stored, self._change, self._dtype, self._where = stored, change, dtype, where

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self._stored.shape)

    def pieces(self) -> Iterator[Tensor]:
        """Its rows in order, some at a time."""
        if not self._stored.ndim:
            yield self._summed(
                self._stored.reshape(1), None if self._change is None else self._change.reshape(1)
            )
            return
        row = max(1, self._stored[0].numel() if len(self._stored) else 1) * 4
        step = max(1, PIECE_BYTES // row)
        for begin in range(0, len(self._stored), step):
            rows = slice(begin, begin + step)
            yield self._summed(self._stored[rows], None if self._change is None else self._change[rows])

    def whole(self) -> Tensor:
        """All of it."""
        made = torch.empty(self.shape, dtype=self._dtype, device=self._stored.device)
        begin = 0
        for piece in self.pieces():
            made.view(-1)[begin : begin + piece.numel()] = piece.reshape(-1)
            begin += piece.numel()
        return made

    def _summed(self, stored: Tensor, change: Tensor | None) -> Tensor:
        if change is None:
            return cast(stored, self._dtype, self._where)
        # Rounded once, from a sum in fp32.
        exact = torch.promote_types(change.dtype, torch.float32)
        if stored.is_floating_point() and stored.dtype.itemsize > exact.itemsize:
            exact = stored.dtype
        total = stored.to(exact) + change.to(stored.device, exact)
        # One pass; only a sum that is not finite needs a look at each.
        if not (math.isfinite(total.sum()) or bool(torch.isfinite(total).all())):
            raise MergeError(
                f"{self._where}: the merged weight would not be finite. The adapter seems to be broken; nothing was "
                "written."
            )
        return cast(total, self._dtype, self._where)


def cast(value: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """`value` in `dtype`.

    Raises:
        MergeError: a finite number lies outside what `dtype` holds.
    """
    if value.dtype == dtype or not value.is_floating_point():
        return value
    made = value.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(value.dtype).max
    if narrower and bool((~torch.isfinite(made) & torch.isfinite(value)).any()):
        raise MergeError(
            f"{where}: numbers up to {value.abs().max():.3g} are outside the range of {dtype}. Write torch.bfloat16 or "
            "torch.float32."
        )
    return made


class Merged:
    """The merged tensors of a part of a base, made one layer at a time.

    Args:
        changes: name in the bare base -> what is done to it.
        dtypes: name -> of what is made.
    """

    def __init__(self, changes: Mapping[str, Change | None], dtypes: Mapping[str, torch.dtype]) -> None:
        self._changes, self._dtypes = changes, dtypes
        self._made: tuple[Any, tuple[str, ...], Tensor | None, Tensor | None] | None = None

    def value(self, key: str, place: Place | None) -> Value:
        """The tensor `key` merged. A collective where something of its layer rests in pieces.

        Raises:
            MergeError: its values are on meta, or it would not be finite.
        """
        change, dtype = self._changes.get(key), self._dtypes[key]
        if change is None:
            assert place is not None
            return Value(_stored(place, key), None, dtype, key)
        if change.replaces:
            return Value(whole(change.wrapper.held(change.names[0])[change.part]), None, dtype, key)
        dW, db = self._computed(change)
        base = change.wrapper.base
        if change.part == "bias":
            return Value(base.bias(), db, dtype, key)
        stored = base.as_stored(base.weight())
        if stored.is_meta:
            raise MergeError(f"{key!r} is on the meta device and has no values. Load the base first.")
        added = None if dW is None else base.as_stored(dW)
        if added is not None and added.shape != stored.shape:
            raise MergeError(
                f"{key}: the change crosses the layer's {base.site.groups} groups, so the merged weight would be "
                f"{tuple(base.as_stored(base.widened(dW)).shape)}, not {tuple(stored.shape)}: no checkpoint of this "
                "architecture can hold that. Keep the adapter."
            )
        return Value(stored, added, dtype, key)

    def _computed(self, change: Change) -> tuple[Tensor | None, Tensor | None]:
        """(dW, db) of the wrapper's layer: its weight and its bias are asked for one after the other."""
        if self._made is None or self._made[:2] != (change.wrapper, change.names):
            self.forget()
            dW, db = change.wrapper.change(change.names)
            if db is not None and not change.wrapper.base.site.bias:
                raise _no_bias(change.wrapper, change.names[-1])
            self._made = (change.wrapper, change.names, dW, db)
        return self._made[2], self._made[3]

    def forget(self) -> None:
        """Lets go of what was computed last."""
        self._made = None


def _stored(place: Place, key: str) -> Tensor:
    tensor = place.tensor
    if is_packed(place):
        return door(place.module, key).weight()
    if tensor.is_meta:
        raise MergeError(f"{key!r} is on the meta device and has no values. Load the base first.")
    with gathered([tensor] if isinstance(tensor, nn.Parameter) else []):
        return tensor.detach()


def is_packed(place: Place) -> bool:
    """Whether the tensor is stored as codes."""
    return place.leaf == "weight" and is_quantised(place.module)


def shape_of(place: Place) -> tuple[int, ...]:
    """The tensor's whole shape, also while it rests in pieces."""
    return tuple(whole_shape(place.tensor))


def tensors_of(
    keys: Iterable[str], changes: Mapping[str, Change | None], places: Mapping[str, Place]
) -> list[Tensor]:
    """What has to be whole while these are merged: the layers' own tensors, and those of their adapters."""
    found: list[Any] = []
    for key in keys:
        place, change = places[key], changes[key]
        if change is not None:
            for name in change.names:
                found += change.wrapper.held(name).values()
            if change.replaces:
                continue
            base = change.wrapper.base
            found += [
                p for each in (base.key, base.bias_key) if (p := base.layer._parameters.get(each)) is not None
            ]
        # Scales of codes are parameters beside them.
        found += place.module._parameters.values() if is_packed(place) else [place.tensor]
    return [t for t in found if isinstance(t, nn.Parameter)]
