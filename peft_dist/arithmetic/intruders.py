"""Directions that a LoRA puts into W + dW and that W has not, weakened: what the base knew comes back, at some cost of
what was learned (Shuttleworth et al. 2024, arXiv:2410.21228)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_dist.adapted import Adapted
from peft_dist.errors import ConfigError
from peft_dist.inject import adapter_modules


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Adds a copy of a LoRA whose intruders are weakened, and makes it the active one.

    Args:
        top_k: how many of the strongest directions of W + dW are looked at.
        threshold_epsilon: one whose cosine with every direction of W is below is an intruder.
        mitigation_lambda: the share of it that stays.
        logging_sink: is told what was found at each layer.

    Raises:
        ConfigError: the adapter is no plain LoRA.
    """
    config = peft_model.peft_config[old_adapter_name]
    if config.peft_type != "LORA" or config.use_dora or config.start in ("pissa", "olora", "corda", "loftq"):
        raise ConfigError(
            f"reduce_intruder_dimension: adapter {old_adapter_name!r} is no plain LoRA. Convert it first."
        )
    tell = logging_sink or (lambda text: None)
    layers = list(adapter_modules(peft_model.get_base_model()))
    dtypes = {
        t.dtype
        for _, m in layers
        if old_adapter_name in m.adapters
        for t in m.tensors(old_adapter_name).values()
    }
    in_full = not dtypes & {torch.float16, torch.bfloat16}
    peft_model.add_adapter(new_adapter_name, copy.copy(config), autocast_adapter_dtype=in_full)
    for name, module in layers:
        if old_adapter_name not in module.adapters:
            continue
        old, new = module.tensors(old_adapter_name), module.tensors(new_adapter_name)
        for key, tensor in old.items():
            new[key].copy_(tensor)
        if not isinstance(module, Adapted) or "A" not in old:
            continue
        method, base = module.methods[old_adapter_name], module.base
        W = base.weight()
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        away, count = _intruders(W, W + method.delta(old, base), top_k, threshold_epsilon)
        tell(f"{name}: {f'Intruders: {count}' if count else 'No intruders'}")
        if not count:
            continue
        change = (method.delta(old, base) - (1 - mitigation_lambda) * away) / method.scaling(base.site)
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        r = method.rank(base.site)
        root = S[:r].sqrt()
        new["B"].copy_((U[:, :r] * root).view_as(new["B"]))
        new["A"].copy_((root[:, None] * Vh[:r]).view_as(new["A"]))
    tell(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def _intruders(W: Tensor, merged: Tensor, top_k: int, epsilon: float) -> tuple[Tensor, int]:
    """(the part of `merged` in its intruders' directions, how many they are)."""
    U0, _, _ = torch.linalg.svd(W, full_matrices=False)
    U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    cosines = (U.mT @ U0).abs().amax(1)[:top_k]
    found = (cosines < epsilon).nonzero().flatten()
    return U[:, found] * S[found] @ Vh[found], len(found)
