"""A run's own adapter on a model that it may share with other runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peft_dist.pooled import PooledModule, adapter_of
from peft_dist.rows import Rows

ADAPTER = "default"
"""The name of the adapter of a run that has a model for itself; under it checkpoints know every run's."""

_WRAPPED = ("base_layer", "original_module")
"""Where a wrapper keeps the module that it is around."""


@dataclass(frozen=True)
class Seat:
    """One adapter of `model`, a `PeftModel`.

    Args:
        is_shared: whether adapters of other runs stand on the model too. Then rows name their adapter, and all of the
            runs' adapters stay trainable; else the adapter is the active one.
    """

    model: nn.Module
    adapter: str = ADAPTER
    is_shared: bool = False

    @property
    def config(self) -> Any:
        """The adapter's config."""
        return self.model.peft_config[self.adapter]  # type: ignore[union-attr,index]

    @property
    def in_rows(self) -> str | None:
        """What rows of this run name; None for the active adapter."""
        return self.adapter if self.is_shared else None

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by the names that they have in a run alone; those of a layer in
        their names' order: who stood on it first decides theirs there, and the order of a sum how a norm is rounded."""
        found = {
            self._alone(name): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and (not self.is_shared or self._is_own(name, parameter))
        }
        layers = {name: name.partition(f".{ADAPTER}")[0].rpartition(".")[0] for name in found}
        place = {layer: number for number, layer in enumerate(dict.fromkeys(layers.values()))}
        return {name: found[name] for name in sorted(found, key=lambda name: (place[layers[name]], name))}

    def controller(self) -> Any:
        """What acts on the adapter as a whole once a step; None for most methods."""
        owner: Any = getattr(self.model, "base_model", None)
        return getattr(owner, "controllers", {}).get(self.adapter)

    def serving(self) -> AbstractContextManager[None]:
        """Within the context the adapter is the one that serves, for what is asked of the model without rows."""
        if not self.is_shared:
            return contextlib.nullcontext()
        return self.model.using(Rows(adapters=[self.adapter]))  # type: ignore[operator]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within the context the adapter is the active one: forwards whose rows name none are its own."""
        if not self.is_shared:
            yield
            return
        model: Any = self.model
        model.set_adapter(self.adapter)
        try:
            yield
        finally:
            model.set_requires_grad(list(model.peft_config), True)

    def save(self, folder: str) -> None:
        """Writes the adapter into a directory in HF PEFT's layout, as a run alone does; a collective."""
        model: Any = self.model
        if self.adapter == ADAPTER:
            model.save_pretrained(folder, selected_adapters=[ADAPTER])
            return
        aside = Path(f"{folder}.aside")
        model.save_pretrained(str(aside), selected_adapters=[self.adapter])
        if (aside / self.adapter).is_dir():  # on the rank that writes
            Path(folder).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / self.adapter, folder)
            for left in aside.iterdir():
                left.unlink()
            aside.rmdir()

    def _is_own(self, name: str, parameter: nn.Parameter) -> bool:
        owner = adapter_of(parameter)
        return owner == self.adapter if owner is not None else self.adapter in name.split(".")

    def _alone(self, name: str) -> str:
        """A parameter's name in a model of this adapter alone: without the wrappers of others around its layer."""
        module: Any = self.model
        parts = []
        for part in name.split("."):
            is_of_others = isinstance(module, PooledModule) and self.adapter not in module.adapters
            if not (is_of_others and part in _WRAPPED):
                parts.append(ADAPTER if part == self.adapter else part)
            module = getattr(module, "_modules", {}).get(part)
        return ".".join(parts)
