"""Which of a checkpoint's tensors make which of a model's, by transformers' own mapping of names.

The mapping renames keys, stacks a mixture's experts, joins and splits projections, for the architectures that
transformers knows; nothing is read here. A group is what one conversion gives: one tensor of the model, or
several (a fused projection that is split).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import conversion_mapping, core_model_loading

from peft_dist.errors import BaseModelError
from peft_dist.loading.pending import Pending, pending


@dataclass
class Group:
    """One conversion: its inputs in the order in which they are given to it."""

    first: str
    conversion: Any
    sources: list[tuple[str, str, str, Pending]] = field(default_factory=list)
    targets: tuple[str, ...] = ()

    @property
    def only_source(self) -> Pending | None:
        """Its input, where it has one alone and does nothing but name it."""
        is_renaming = isinstance(self.conversion, core_model_loading.WeightRenaming)
        return self.sources[0][3] if is_renaming and len(self.sources) == 1 else None

    def num_bytes(self) -> int:
        """What its inputs take once they are read."""
        return sum(source.numel() * source.dtype.itemsize for *_, source in self.sources)

    def converted(self, model: Any, *, on_meta: bool = False) -> dict[str, Any]:
        """The model's tensors by name: pending ones, or meta tensors that say their shapes and dtypes.

        Args:
            model: as it was when nothing was read yet.
        """
        conversion = copy.deepcopy(self.conversion)
        for target, key, pattern, source in self.sources:
            value = torch.empty(source.shape, dtype=source.dtype, device="meta") if on_meta else source
            conversion.add_tensor(target, key, pattern, value)
        made = conversion.convert(self.first, model=model, config=model.config)
        values = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return values if on_meta else {name: pending(value) for name, value in values.items()}


class Outline:
    """A model as conversions look at it: its config, and tensors of the shapes that they had before any was read."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.state: dict[str, Any] = dict(model.state_dict())

    def get_parameter(self, name: str) -> Tensor:
        """A tensor by its name in the model, on the meta device."""
        return self.state[name]

    get_parameter_or_buffer = get_buffer = get_parameter


@dataclass
class Keys:
    """What a checkpoint holds for a model.

    Attributes:
        outline: of the model. groups: in the order of the model's names. missing: names that nothing makes.
            unexpected: keys, as they are renamed, that the model has no place for. mismatched: name, shape in the
            checkpoint, shape in the model; such a tensor counts as missing, and is in no group.
    """

    outline: Outline
    groups: list[Group]
    missing: set[str]
    unexpected: set[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    def drop(self, name: str) -> None:
        """Leaves out a tensor of the model: nothing makes it any more."""
        for group in self.groups:
            group.targets = tuple(target for target in group.targets if target != name)
        self.groups = [group for group in self.groups if group.targets]
        self.missing.add(name)


def conversions(model: Any, auto_class: Any) -> list[Any]:
    """transformers' renamings and conversions for a model of this auto class, in the order in which they apply."""
    return conversion_mapping.get_model_conversion_mapping(
        model, _renamed(auto_class, model.config), getattr(model, "hf_quantizer", None)
    )


def _renamed(auto_class: Any, config: Any) -> dict[str, str] | None:
    """Some classes keep the same base under another name than the language model that it was saved from:
    `LlamaForQuestionAnswering` calls `transformer` what `LlamaForCausalLM` calls `model`."""
    wanted = auto_class._model_mapping.get(type(config), None)
    saved = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    if wanted is None or saved is None or isinstance(wanted, tuple) or isinstance(saved, tuple):
        return None
    if auto_class is transformers.AutoModel or wanted.base_model_prefix == saved.base_model_prefix:
        return None
    if wanted.__name__ in (getattr(config, "architectures", None) or ()):
        return None
    return {rf"^{saved.base_model_prefix}\.": f"{wanted.base_model_prefix}."}


def match(
    model: Any,
    tensors: Mapping[str, Pending],
    mapping: Sequence[Any],
    dtype: torch.dtype,
    quantised: frozenset[str],
) -> Keys:
    """Finds what makes each tensor of the model.

    Args:
        model: on the meta device.
        tensors: of the checkpoint, by key.
        dtype: that floating tensors are loaded in.
        quantised: names of weights that are quantised from `dtype`, and have other shapes once they are.

    Raises:
        BaseModelError: a conversion cannot be done with the tensors that are there.
    """
    library = core_model_loading
    outline = Outline(model)
    state = outline.state
    renamings = [entry for entry in mapping if isinstance(entry, library.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, library.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    exact = _exact_dtypes(model, dtype)
    groups: dict[str, Group] = {}
    unexpected: set[str] = set()
    prefix = model.base_model_prefix
    for key in sorted(tensors, key=library.dot_natural_key):
        name, pattern = library.rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = library.rename_source_key(key, [], [], prefix, state)
        if name not in state:
            unexpected.update(_unmatched(name, None if pattern is None else by_pattern[pattern]))
            continue
        group = groups.get(name)
        if group is None:
            conversion = library.WeightRenaming(key, name) if pattern is None else by_pattern[pattern]
            group = groups[name] = Group(name, conversion)
        source = tensors[key]
        wanted = exact(name) or (dtype if name in quantised else state[name].dtype)
        group.sources.append((name, key, key if pattern is None else pattern, source.to(wanted)))
    # What saving the model again undoes.
    model._weight_conversions = [used for used in mapping if used.was_used()]
    return _sized(outline, list(groups.values()), unexpected, quantised)


def _unmatched(name: str, converter: Any) -> Iterator[str]:
    if converter is None:
        yield name
        return
    for target in converter.target_patterns:
        yield name.replace(converter.target_patterns[0], target)


def _exact_dtypes(model: Any, dtype: torch.dtype) -> Any:
    """The dtype that the model asks for by a tensor's name, whatever it is loaded in; None where it does not."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name: None
    patterns, by_group, _ = core_model_loading.build_glob_alternation(list(plan))

    def asked(name: str) -> torch.dtype | None:
        found = patterns.search(name)
        return None if found is None else plan[by_group[found.lastgroup or ""]]

    return asked


def _sized(outline: Outline, groups: list[Group], unexpected: set[str], quantised: frozenset[str]) -> Keys:
    state = outline.state
    missing, mismatched = set(state), []
    for group in groups:
        try:
            made = group.converted(outline, on_meta=True)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            keys = ", ".join(key for _, key, *_ in group.sources[:3])
            raise BaseModelError(
                f"base model: {group.first} cannot be made of {len(group.sources)} tensors of the checkpoint "
                f"({keys}): {error}. Its files belong to another version of the architecture, or are incomplete."
            ) from error
        fitting = []
        for name, value in made.items():
            if name not in state:
                unexpected.add(name)
                continue
            there, here = tuple(value.shape), tuple(state[name].shape)
            if there != here and name not in quantised:
                mismatched.append((name, there, here))
                continue
            missing.discard(name)
            fitting.append(name)
        group.targets = tuple(fitting)
    order = {name: number for number, name in enumerate(state)}
    kept = sorted((group for group in groups if group.targets), key=lambda group: order[group.targets[0]])
    return Keys(outline, kept, missing, unexpected, mismatched)
