"""Transformers' conversion of checkpoints backwards: which tensors of a model make which of its files.

Most are called in a file what they are called in the model; some are renamed, and some are many in a file, such as a
mixture model's experts, which the model has stacked. A group is what has to be converted together. The way forward is
`loading.keys`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import conversion_mapping, core_model_loading

from peft_dist.errors import MergeError


@dataclass
class Group:
    """Tensors that are converted together.

    Attributes:
        name: the first of the names that it gives. sources: name -> the converter's pattern that it matched, in order.
        converter: None where a tensor only gets another name.
    """

    name: str
    converter: Any = None
    sources: dict[str, str] = field(default_factory=dict)

    def converted(self, tensors: Mapping[str, Any], outline: Any) -> dict[str, Any]:
        """What becomes of its tensors, by their new names. Those on meta stay there, and unread ones unread where the
        conversion needs no values."""
        if self.converter is None:
            ((source, _),) = self.sources.items()
            return {self.name: tensors[source]}
        converter = copy.deepcopy(self.converter)
        for source, pattern in self.sources.items():
            converter.add_tensor(self.name, source, pattern, tensors[source])
        with torch.no_grad():
            made = converter.convert(self.name, model=outline, config=outline.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class Conversion:
    """How a model's tensors become those that a checkpoint of its architecture has.

    Args:
        outline: the model, on meta.
        transforms: what its weights went through when they were loaded; None: what its architecture's go through.
    """

    def __init__(self, outline: Any, transforms: Sequence[Any] | None = None) -> None:
        self.outline = outline
        self._transforms = transforms

    def to_files(self, keys: Iterable[str]) -> list[Group]:
        """The groups that make a checkpoint's tensors, under the names that the original has, of the model's."""
        loading = core_model_loading
        renamings, converters = _kinds(self._reversed())
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        groups: dict[str, Group] = {}
        for key in sorted(keys, key=loading.dot_natural_key):
            name, pattern = loading.apply_converters(key, converters)
            if pattern is None:
                name = loading.apply_renamings(key, renamings)
                if name in groups:
                    raise MergeError(
                        f"{key!r} and {next(iter(groups[name].sources))!r} would both be called {name!r} in the files."
                    )
                groups[name] = Group(name, None, {key: key})
            else:
                converter = _Renamed(by_pattern[pattern], renamings)
                groups.setdefault(name, Group(name, converter)).sources[key] = pattern
        return list(groups.values())

    def _reversed(self) -> list[Any]:
        transforms = self._transforms
        if transforms is None:
            # Those of its architecture; whether a prefix was taken off nobody knows.
            transforms = [
                each
                for each in conversion_mapping.get_model_conversion_mapping(self.outline, add_legacy=False)
                if not isinstance(each, core_model_loading.PrefixChange)
            ]
        made = []
        for each in transforms[::-1]:
            try:
                made.append(each.reverse_transform())
            except NotImplementedError:
                # It unpacked stored codes; what is written has none.
                continue
        return made


class _Renamed:
    """A converter whose results are renamed once more."""

    def __init__(self, converter: Any, renamings: Sequence[Any]) -> None:
        self._converter, self._renamings = converter, renamings

    def __deepcopy__(self, memo: Any) -> _Renamed:
        return _Renamed(copy.deepcopy(self._converter, memo), self._renamings)

    def add_tensor(self, *args: Any) -> None:
        """As the converter's own."""
        self._converter.add_tensor(*args)

    def convert(self, name: str, **kwargs: Any) -> dict[str, Any]:
        """As the converter's own."""
        made = self._converter.convert(name, **kwargs)
        return {
            core_model_loading.apply_renamings(key, list(self._renamings)): each for key, each in made.items()
        }


def _kinds(transforms: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    return (
        [each for each in transforms if isinstance(each, core_model_loading.WeightRenaming)],
        [each for each in transforms if isinstance(each, core_model_loading.WeightConverter)],
    )
