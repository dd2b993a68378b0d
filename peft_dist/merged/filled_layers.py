"""The layers of a model on meta that have values for a while: those that one step of a merge needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from peft_dist.adapted import AdapterModule
from peft_dist.checkpoint.filling import load_one
from peft_dist.checkpoint.names import Holder
from peft_dist.loading.pending import Pending
from peft_dist.merged.plan import Item, Plan
from peft_dist.merged.stored_adapter import StoredTensors


class FilledLayers:
    """Puts weights in their places in a model and fills the adapter's tensors there, a step at a time.

    Args:
        plan: of the merge. pending: the base's tensors, unread. tensors: of the adapter, `config` its own.
        holders: what has tensors of the adapter, by the id of its module.
    """

    def __init__(
        self,
        plan: Plan,
        pending: Mapping[str, Pending],
        tensors: StoredTensors,
        config: Any,
        holders: Mapping[int, Holder],
    ) -> None:
        self._plan, self._pending, self._tensors, self._config = plan, pending, tensors, config
        self._holders = holders

    def fill_common(self) -> None:
        """Fills, for good, what all layers of the adapter share."""
        for holder in self._holders.values():
            if not isinstance(holder.module, AdapterModule):
                load_one(holder, self._tensors.of(holder.layer, holder.saved), self._config, "cpu")

    @contextlib.contextmanager
    def during(self, step: Sequence[Item]) -> Iterator[None]:
        """Within it the layers that `step` changes have their values, and so has the adapter there."""
        keys = [key for item in step for key in item.keys]
        if not any(map(self._plan.adds, keys)):
            yield
            return
        wrappers: dict[int, Any] = {}
        for change in filter(None, (self._plan.changes[key] for key in keys)):
            for each in (change.wrapper, *(change.source(name) for name in change.names)):
                wrappers[id(each)] = each
        needed = dict.fromkeys(key for key in keys if self._plan.changes[key] is None)
        for wrapper in wrappers.values():
            needed |= dict.fromkeys(self._keys_of(wrapper))
        holders = [self._holders[id(wrapper)] for wrapper in wrappers.values()]
        put: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for key in needed:
                self._put(key, put)
            for holder in holders:
                load_one(holder, self._tensors.below(holder.layer), self._config, "cpu")
            yield
        finally:
            for module, leaf, empty in put:
                module._parameters[leaf] = empty
            for holder in holders:
                holder.module.empty(holder.adapter)

    def _keys_of(self, wrapper: Any) -> list[str]:
        """The names of a layer's own tensors that its adapter may read."""
        base = wrapper.base
        return [
            key
            for key, place in self._plan.places.items()
            if any(each is wrapper for each, _ in place.wrappers)
            and place.module is base.layer
            and place.leaf in (base.key, base.bias_key)
        ]

    def _put(self, key: str, put: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
        place = self._plan.places[key]
        empty = place.module._parameters.get(place.leaf)
        if empty is None or not empty.is_meta:
            return
        put.append((place.module, place.leaf, empty))
        place.module._parameters[place.leaf] = nn.Parameter(self._pending[key].whole(), requires_grad=False)
