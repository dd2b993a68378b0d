"""Heads of one base: each adapter's own, with labels of its own, run on the rows that are its own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .engine import AdapterRefused
from .heads import HeadTask

NAMES: dict[HeadTask, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score", "classification_head"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "FEATURE_EXTRACTION": (),
}
"""The attribute of a base that is its head."""
_BEFORE = ("base_model.model.", "base_model.")
"""What checkpoints put before the names of a base's tensors."""


class Tap(nn.Module):
    """In the place of a base's head: keeps what the head would be given, and gives zeros."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self._num_outputs = num_outputs
        self.seen: Tensor | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., width) -> zeros (..., labels)."""
        self.seen = hidden
        return hidden.new_zeros(*hidden.shape[:-1], self._num_outputs)


@dataclasses.dataclass(frozen=True)
class OwnHead:
    """A head with what its outputs are called."""

    module: nn.Module
    labels: tuple[str, ...]
    may_be_empty: bool = False
    """qa: whether it was trained on questions without an answer."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, ..., width) -> (rows, ..., labels), in float32."""
        weight = next(self.module.parameters(), None)
        return self.module(hidden if weight is None else hidden.to(weight.dtype)).float()


def name_of_head(base: nn.Module, task: HeadTask) -> str | None:
    """The attribute that is the base's head; None where its task has none.

    Raises:
        AdapterRefused: it has no head by a known name.
    """
    if not NAMES[task]:
        return None
    found = next((name for name in NAMES[task] if isinstance(getattr(base, name, None), nn.Module)), None)
    if found is None:
        raise AdapterRefused(
            f"{type(base).__name__} has no {' or '.join(NAMES[task])}, which are known as heads."
        )
    return found


def split(saved: Any, head: str | None) -> tuple[Any, dict[str, Tensor]]:
    """What of a saved adapter is put on the base, and the tensors of its own head by their names within it."""
    if head is None:
        return saved, {}
    own, others = {}, {}
    for name, tensor in saved.tensors.items():
        inner = plain(name)
        if inner.startswith(f"{head}."):
            own[inner.removeprefix(f"{head}.")] = tensor
        else:
            others[name] = tensor
    config = copy.copy(saved.config)
    listed = getattr(config, "modules_to_save", None)
    if listed:
        config.modules_to_save = [each for each in listed if each not in _ALL_HEADS] or None
    return dataclasses.replace(saved, tensors=others, config=config), own


_ALL_HEADS = frozenset(name for names in NAMES.values() for name in names)


def plain(name: str) -> str:
    """A checkpoint's name of a base's tensor as the base calls it."""
    return next((name.removeprefix(start) for start in _BEFORE if name.startswith(start)), name)


def own_module(head: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the base's head with an adapter's tensors, of as many outputs as they have.

    Raises:
        AdapterRefused: they are not those of such a head.
    """
    module = copy.deepcopy(head)
    there = dict(module.named_parameters())
    if other := sorted(there.keys() ^ tensors.keys()):
        raise AdapterRefused(f"its head and the base's differ in {', '.join(other[:4])}.")
    for name, parameter in there.items():
        tensor = tensors[name]
        if tensor.shape[1:] != parameter.shape[1:]:
            raise AdapterRefused(
                f"its head's {name} is {tuple(tensor.shape)}, the base's {tuple(parameter.shape)}: of another width."
            )
        owner, _, last = name.rpartition(".")
        layer = module.get_submodule(owner)
        setattr(layer, last, nn.Parameter(tensor.to(parameter.device), requires_grad=False))
        if isinstance(layer, nn.Linear):
            layer.out_features = len(tensor)
    return module.eval().requires_grad_(False)


def label_names(said: Sequence[str], config: Any, num: int, what: str) -> tuple[str, ...]:
    """The names of a head's outputs: what stands beside the adapter, else the base's config, else their numbers.

    Raises:
        AdapterRefused: the adapter names another number of labels than its head has.
    """
    if said:
        if len(said) != num:
            raise AdapterRefused(f"{what} tells {num} labels apart, and {len(said)} are named beside it.")
        return tuple(said)
    named = getattr(config, "id2label", None) or {}
    if len(named) == num:
        return tuple(str(named[number]) for number in sorted(named))
    return tuple(f"LABEL_{number}" for number in range(num))


def check_brought(fresh: frozenset[str], tensors: Mapping[str, Tensor]) -> None:
    """Refuses an adapter that relies on weights which the base's files do not hold: they would be others each time.

    Raises:
        AdapterRefused: names one.
    """
    brought = {plain(name) for name in tensors}
    if missing := sorted(fresh - brought):
        where = ".".join(missing[0].split(".")[:1])
        raise AdapterRefused(
            f"the base's files do not hold {missing[0]}, and neither does the adapter, so that it would be made up. "
            f"Train it with `adapter: {{modules_to_save: [{where}]}}`."
        )


def num_outputs(module: nn.Module, width: int) -> int:
    """How many values a head gives."""
    like = next(module.parameters())
    return int(module(torch.zeros((1, 1, width), dtype=like.dtype, device=like.device)).shape[-1])
