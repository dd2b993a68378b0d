"""The merged model by its names alone: the base's architecture on meta, with the config that will be written."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist.errors import MergeError


class Outline:
    """A model of the base's class on meta, without adapters.

    Args:
        kind: the base's class. config: of the base; a copy is kept.

    Attributes:
        model: on meta. config: as it will be written.

    Raises:
        MergeError: the class is not made from its config alone.
    """

    def __init__(self, kind: type[nn.Module], config: Any) -> None:
        self.config = copy.deepcopy(config)
        self._kind = kind
        _forget_quantisation(self.config)
        self.model = self._built()

    def _built(self) -> Any:
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model: Any = self._kind(copy.deepcopy(self.config))
        except Exception as error:
            raise MergeError(
                f"{self._kind.__name__} cannot be made from its config ({type(error).__name__}: {error}), so nothing "
                "says which tensors a checkpoint of it has. Use merge_and_unload, and save it yourself."
            ) from error
        model.tie_weights()
        return model

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint of it holds, tied ones under each of their names."""
        ignored = getattr(self.model, "_keys_to_ignore_on_save", None) or ()
        held = {key: t for key, t in self.model.state_dict().items() if isinstance(t, Tensor)}
        return {key: t for key, t in held.items() if key not in ignored}

    def ties(self) -> list[tuple[str, ...]]:
        """The names that are one tensor, of each such tensor; the first is the one that a checkpoint has."""
        names: dict[int, list[str]] = {}
        for key, tensor in _named(self.model):
            names.setdefault(id(tensor), []).append(key)
        declared = self._declared()
        return [
            tuple(sorted(each, key=lambda key: key in declared)) for each in names.values() if len(each) > 1
        ]

    def _declared(self) -> set[str]:
        """The names that its class calls copies of others."""
        return set(self.model.get_expanded_tied_weights_keys(all_submodels=True))

    def untie(self, tie: Sequence[str]) -> None:
        """Lets the names of a tie be tensors of their own, by the config where that can say so.

        Where an architecture ties always, transformers leaves apart what a checkpoint holds twice with unlike values.

        Raises:
            MergeError: one module stands in the model under several names.
        """
        declared = self._declared()
        shared = [key for key in tie if key not in declared]
        if len(shared) > 1:
            raise MergeError(
                f"{shared[0]!r} and {shared[1]!r} are one module of {self._kind.__name__}, and the adapter changes one "
                "place where it stands alone: no checkpoint of this architecture can hold that. Keep the adapter."
            )
        changed = copy.deepcopy(self.config)
        for part in _parts(changed):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False
        # Some configs mean more by it, or force it.
        made = type(changed).from_dict(changed.to_dict())
        if _facts(made) == _facts(self.config) and not made.tie_word_embeddings:
            self.config = changed
            self.model = self._built()


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        part = getattr(config, name, None)
        if part is not None and part is not config:
            yield from _parts(part)


def _facts(config: Any) -> dict[str, Any]:
    """What a config says, ties aside."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(each) for key, each in value.items() if key != "tie_word_embeddings"}
        return value

    return without(config.to_dict())


def _forget_quantisation(config: Any) -> None:
    """What is written holds whole numbers."""
    for part in _parts(config):
        part.__dict__.pop("quantization_config", None)
        part.__dict__.pop("_pre_quantization_dtype", None)
