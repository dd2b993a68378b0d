"""`layer_replication`: a model of more decoder layers than it has weights for. A layer that stands in it several times
shares its Parameters and gets adapters of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from peft_dist.errors import ConfigError
from peft_dist.sharding import is_partitioned

# What of a replicated list says how it was made.
_MAP = "replicated_by"


def replicate(model: nn.Module, ranges: Sequence[Sequence[int]], has_adapters: bool) -> Callable[[], None]:
    """Makes the base's decoder layers those of `ranges` (start, end), one after another, in place.

    Args:
        has_adapters: whether adapters sit on the model's layers already.

    Returns:
        what puts the layers back that were there.

    Raises:
        ConfigError: no list of layers, ranges that are none of it, or layers that adapters sit on.
    """
    wanted = [list(each) for each in ranges or ()]
    if not wanted or any(len(each) != 2 for each in wanted):
        raise ConfigError(f"layer_replication: {ranges!r}; it lists ranges (start, end) of layers.")
    holder, key = _layers(model)
    layers: Any = getattr(holder, key)
    made = layers.__dict__.get(_MAP)
    if made == wanted:
        return lambda: None
    if made is not None or has_adapters:
        raise ConfigError(
            f"layer_replication: {wanted}; "
            + (f"the model is made of {made} already. " if made else "adapters sit on its layers already. ")
            + "Load the base again, and add this adapter first."
        )
    for start, end in wanted:
        if not 0 <= start < end <= len(layers):
            raise ConfigError(
                f"layer_replication: {[start, end]} is no range within the base's {len(layers)} layers."
            )
    if any(is_partitioned(p) for p in layers.parameters()):
        raise ConfigError(
            "layer_replication: the base's layers are partitioned already, and copies of them could not gather their "
            "weights. Add this adapter before the base is partitioned."
        )
    order = [index for start, end in wanted for index in range(start, end)]
    new = nn.ModuleList(_sharing(layers[index]) for index in order)
    new.train(layers.training)
    new.__dict__[_MAP] = wanted
    for place, layer in enumerate(new):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = place  # type: ignore[assignment]
    config = getattr(model, "config", None)
    before = {
        name: getattr(config, name) for name in ("num_hidden_layers", "layer_types") if hasattr(config, name)
    }
    setattr(holder, key, new)
    if "num_hidden_layers" in before:
        config.num_hidden_layers = len(new)  # type: ignore[union-attr]
    if before.get("layer_types"):
        config.layer_types = [before["layer_types"][index] for index in order]  # type: ignore[union-attr]

    def undo() -> None:
        setattr(holder, key, layers)
        for name, value in before.items():
            setattr(config, name, value)

    return undo


def replicate_layers(model: nn.Module, layer_map: Sequence[Sequence[int]]) -> None:
    """Makes a bare base's decoder layers those of `layer_map`, in place."""
    replicate(model, layer_map, has_adapters=False)


def _layers(model: Any) -> tuple[Any, str]:
    """The module that holds the list of decoder layers, and under which name."""
    module = model
    for inner in ("model", "bert", "transformer"):
        while isinstance(getattr(module, inner, None), nn.Module):
            module = getattr(module, inner)
    for holder, key in ((module, "layers"), (getattr(module, "encoder", None), "layer"), (module, "h")):
        if isinstance(getattr(holder, key, None), nn.ModuleList):
            return holder, key
    raise ConfigError(
        f"layer_replication: {type(model).__name__} has no list of decoder layers named layers, encoder.layer or h."
    )


def _sharing(layer: nn.Module) -> nn.Module:
    """A copy of a layer over the same Parameters and buffers."""
    same = {id(t): t for t in (*layer.parameters(), *layer.buffers())}
    return copy.deepcopy(layer, memo=same)
