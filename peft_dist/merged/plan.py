"""What a merged checkpoint will hold, from names and sizes alone, before any tensor is gathered or read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist.base_layer import door
from peft_dist.errors import MergeError
from peft_dist.merge import dtype_of
from peft_dist.merged.changes import Change, Place, change_of, check_biases, is_packed, place_of, shape_of
from peft_dist.merged.conversion import Conversion, Group
from peft_dist.merged.outline import Outline
from peft_dist.merged.shards import Entry, Shard, split


@dataclass
class Item:
    """Tensors of the files that are made together, of those of the model."""

    group: Group
    entries: tuple[Entry, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The model's tensors that it is made of."""
        return tuple(self.group.sources)


@dataclass
class Plan:
    """What is written.

    Attributes:
        outline: the model that opens it. steps: items that are made one after the other, since they need the same
            layer. places, changes, dtypes: by the tensors' names in the bare base.
    """

    outline: Outline
    steps: list[list[Item]]
    places: dict[str, Place]
    changes: dict[str, Change | None]
    dtypes: dict[str, torch.dtype]

    @property
    def entries(self) -> list[Entry]:
        """Every tensor of the files, in their order."""
        return [entry for step in self.steps for item in step for entry in item.entries]

    @property
    def is_quantised(self) -> bool:
        """Whether layers of the base are stored as codes."""
        return any(map(is_packed, self.places.values()))

    @property
    def widest(self) -> torch.dtype:
        """What holds every floating number exactly: codes may stand for another dtype than the other weights are."""
        floats = {dtype for dtype in self.dtypes.values() if dtype.is_floating_point}
        return functools.reduce(torch.promote_types, floats)

    def adds(self, key: str) -> bool:
        """Whether something is added to a tensor of the base; else it is copied, from the base or the adapter."""
        change = self.changes[key]
        return change is not None and not change.replaces

    def shards(self, max_bytes: int) -> list[Shard]:
        """The files."""
        return split(self.entries, max_bytes)

    def wrappers(self) -> list[Any]:
        """Those whose adapters change something."""
        found = {id(c.wrapper): c.wrapper for c in self.changes.values() if c is not None and not c.replaces}
        return list(found.values())


def plan_merged(
    base: Any,
    names: Sequence[str],
    dtype: torch.dtype | None = None,
    is_apart: Callable[[Sequence[str]], bool] = lambda tie: False,
    left_out: Collection[str] = (),
    from_codes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> Plan:
    """What a checkpoint of `base` with the named adapters in its weights holds.

    Args:
        dtype: of the floating tensors; None: the base's own, of a quantised layer what it computes in.
        is_apart: whether what the architecture ties has several values by itself.
        left_out: names of tensors that are not written.
        from_codes: the dtype of weights that stand for codes of a file, where `dtype` is None.

    Raises:
        MergeError: no checkpoint of the base's architecture can hold it; says where and why.
    """
    if not hasattr(base, "config") or not hasattr(base, "save_pretrained"):
        raise MergeError(
            f"{type(base).__name__} is no model of transformers, so there is no config to write beside its weights. "
            "Use merge_and_unload, and save it yourself."
        )
    outline = Outline(type(base), base.config)
    places = _places(base, outline)
    changes = {key: change_of(place, names) for key, place in places.items()}
    skipped = _tied_away(outline, places, changes, is_apart)
    made = Plan(
        outline,
        [],
        places,
        changes,
        {key: _dtype_of(base, place, dtype or from_codes.get(key)) for key, place in places.items()},
    )
    check_biases(_every_wrapper(places), names)
    conversion = Conversion(outline.model, getattr(base, "_weight_conversions", None))
    wanted = {key: t for key, t in outline.tensors().items() if key not in skipped and key not in left_out}
    items = [item_of(group, wanted, made.dtypes, outline) for group in conversion.to_files(wanted)]
    made.steps = in_steps(items, changes)
    return made


def item_of(
    group: Group, sizes: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], outline: Outline
) -> Item:
    """The item of a group: its tensors' names and sizes, by running its conversion on meta."""
    empty = {key: torch.empty(sizes[key].shape, dtype=dtypes[key], device="meta") for key in group.sources}
    made = group.converted(empty, outline.model)
    return Item(group, tuple(Entry(name, t.dtype, tuple(t.shape)) for name, t in made.items()))


def in_steps(items: Iterable[Item], changes: Mapping[str, Change | None]) -> list[list[Item]]:
    """Items in their order; those that need the same adapted layer together."""
    steps: list[list[Item]] = []
    at: dict[int, int] = {}
    for item in items:
        found = (changes.get(key) for key in item.keys)
        needs = {id(each.wrapper) for each in found if each is not None and not each.replaces}
        known = sorted({at[need] for need in needs if need in at})
        if not known:
            steps.append([item])
            known = [len(steps) - 1]
        else:
            for other in known[1:]:
                steps[known[0]] += steps[other]
                steps[other] = []
            steps[known[0]].append(item)
        at |= dict.fromkeys([*needs, *(need for need, step in at.items() if step in known)], known[0])
    return [step for step in steps if step]


def _places(base: nn.Module, outline: Outline) -> dict[str, Place]:
    places = {}
    for key, empty in outline.tensors().items():
        place = place_of(base, key)
        if place is None:
            raise MergeError(
                f"{type(base).__name__} as its config describes it has {key!r}, and this one has not: it was changed "
                "after it was made. Use merge_and_unload, and save it yourself."
            )
        here = door(place.module, key).shape if is_packed(place) else shape_of(place)
        if here != tuple(empty.shape):
            raise MergeError(
                f"{key!r} is {here} here and {tuple(empty.shape)} by the config of {type(base).__name__}: it was "
                "changed after it was made. Put the config right, or use merge_and_unload and save it yourself."
            )
        places[key] = place
    return places


def _tied_away(
    outline: Outline,
    places: Mapping[str, Place],
    changes: Mapping[str, Change | None],
    is_apart: Callable[[Sequence[str]], bool],
) -> set[str]:
    """The names that are not written, since others stand for them. Unties what is no longer one tensor."""

    def parted(tie: Sequence[str]) -> bool:
        first = tie[0]
        return (
            is_apart(tie)
            or any(
                places[key].tensor is not places[first].tensor
                or not (
                    changes[key] is changes[first] is None
                    or (changes[key] is not None and changes[key].is_same(changes[first]))  # type: ignore[union-attr]
                )
                for key in tie[1:]
            )
        )

    for tie in outline.ties():
        if parted(tie):
            outline.untie(tie)
    return {key for tie in outline.ties() if not parted(tie) for key in tie[1:]}


def _every_wrapper(places: Mapping[str, Place]) -> list[Any]:
    found = {id(w): w for place in places.values() for w, _ in place.wrappers if hasattr(w, "base")}
    return list(found.values())


def _dtype_of(base: Any, place: Place, asked: torch.dtype | None) -> torch.dtype:
    if is_packed(place):
        computes = getattr(place.module, "compute_dtype", None)
        return asked or computes or dtype_of(base)
    own = place.tensor.dtype
    return asked if asked is not None and own.is_floating_point else own
