"""The trained tensors as they are, in checkpoints of methods whose saved form is not enough to go on from.

What `save_pretrained` writes is for those who use the adapter: AdaLoRA leaves out what its budget has pruned so far,
VB-LoRA may keep only its largest weights, OSF the change of a weight. A run goes on with the tensors themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_dist.contract import Method
from peft_dist.sharding import is_partitioned, set_whole, whole

from .seat import Seat

_PREFIX = "tensor/"


def raw_tensors(seat: Seat) -> dict[str, Tensor]:
    """Every trained tensor by its name in a run alone, where the adapter's method has a saved form of its own or acts
    on the adapter as a whole; else nothing. A collective where some rest in pieces."""
    config = seat.config
    exports = isinstance(config, Method) and type(config).export is not Method.export
    if not exports and seat.controller() is None:
        return {}
    return {
        f"{_PREFIX}{name}": whole(parameter) if is_partitioned(parameter) else parameter.detach()
        for name, parameter in seat.trained().items()
    }


def are_in(state: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint has them."""
    return any(name.startswith(_PREFIX) for name in state)


def restore(seat: Seat, state: Mapping[str, Tensor]) -> None:
    """Takes them back into a fresh adapter of the same config."""
    with torch.no_grad():
        for name, parameter in seat.trained().items():
            if (saved := state.get(f"{_PREFIX}{name}")) is not None:
                set_whole(parameter, saved)


def without(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other tensors of a checkpoint."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(_PREFIX)}
