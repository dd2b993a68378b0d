"""An adapter's state dictionary, out of a model.

Under ZeRO-3 only the adapter is gathered, never the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from peft_dist.adapted import AdapterModule
from peft_dist.checkpoint.embeddings import embeddings_of
from peft_dist.checkpoint.layout import DEFAULT_ADAPTER
from peft_dist.checkpoint.names import Holder, defines, holders, join, known_adapter
from peft_dist.errors import CheckpointError
from peft_dist.sharding import whole


def state_dict(
    model: nn.Module,
    adapter_name: str = DEFAULT_ADAPTER,
    whole_model: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The adapter's tensors, whole, by their names in a checkpoint; a collective where some are sharded.

    Args:
        whole_model: the model's state dictionary, where another library has gathered it; else the model's own
            tensors are taken.
        save_embedding_layers: add the base's embeddings; "auto" where the adapter sits on them, or where the
            vocabulary was resized.

    Raises:
        AdapterError: there is no such adapter.
        CheckpointError: a tensor is empty or on the meta device, so its values are not known here.
    """
    known_adapter(model, adapter_name)
    tensors: dict[str, Tensor] = {}
    empty = []
    for holder in holders(model, adapter_name):
        made, wanted = _whole_tensors(holder, whole_model), holder.module.wanted(adapter_name)
        # A layer that was left without any rank has tensors without elements by right.
        empty += [holder.hung(n) for n, t in made.items() if not t.numel() and 0 not in wanted[n].shape]
        tensors |= _saved_form(holder, made)
    for key, parameter in embeddings_of(model, adapter_name, save_embedding_layers).items():
        tensors[key] = values(key, parameter)
        empty += [] if tensors[key].numel() else [key]
    if empty:
        raise CheckpointError(
            f"{empty[0]!r} and {len(empty) - 1} more tensors of adapter {adapter_name!r} are empty: "
            "they rest sharded elsewhere. Gather them before saving."
        )
    return tensors


def values(key: str, parameter: Tensor) -> Tensor:
    """A tensor, whole; CheckpointError where its values are not known."""
    if parameter.is_meta:
        raise CheckpointError(
            f"{key!r} is on the meta device and has no values. Load or start the adapter first."
        )
    return whole(parameter)


def _whole_tensors(holder: Holder, whole_model: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The holder's saved tensors by the method's names, whole."""
    own, made = holder.module.tensors(holder.adapter), {}
    for saved, name in holder.saved.items():
        hung = holder.hung(name)
        if whole_model is None:
            made[name] = values(join(holder.layer, saved), own[name])
        elif hung in whole_model:
            made[name] = whole_model[hung]
        else:
            raise CheckpointError(
                f"the whole model lacks {hung!r} of adapter {holder.adapter!r}. Pass the whole one."
            )
    return made


def _saved_form(holder: Holder, whole_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    exported = None
    if defines(holder.method, "export"):
        with torch.no_grad():
            exported = holder.method.export({**_shared(holder), **whole_tensors}, holder.site)
    if exported is None:
        exported = {saved: whole_tensors[name] for saved, name in holder.saved.items()}
    return {join(holder.layer, saved): value for saved, value in exported.items()}


def _shared(holder: Holder) -> dict[str, Tensor]:
    """What the layers of the adapter share, for a layer of it."""
    if not isinstance(holder.module, AdapterModule):
        return {}
    return {name: whole(t) for name, t in holder.module.shared(holder.adapter).items()}
