"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv:2402.12354)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

from peft_dist.adapted import Adapted
from peft_dist.errors import OptimizerError


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer of what is trained in `model`, with four groups: A and the rest, factors of embeddings, B, and
    those of B's rate without weight decay (biases and the parameters of norms).

    Args:
        lr: of A. loraplus_lr_ratio: of B's rate to it, at least 1.
        loraplus_weight_decay: of the groups that decay. loraplus_lr_embedding: the rate of embeddings' factors.
        kwargs: of the optimizer.

    Raises:
        OptimizerError: a rate or a ratio that is no positive number.
    """
    for name, value in (("lr", lr), ("loraplus_lr_ratio", loraplus_lr_ratio)):
        if value <= 0:
            raise OptimizerError(f"create_loraplus_optimizer: {name} is {value!r}; it is above 0.")
    on_embeddings, plain = _kinds(model)
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "plain": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in on_embeddings:
            groups["embedding"].append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            undecayed = "bias" in name or id(parameter) in plain
            groups["plain" if undecayed else "B"].append(parameter)
        else:
            groups["A"].append(parameter)
    rates = {
        "A": lr,
        "embedding": loraplus_lr_embedding,
        "B": lr * loraplus_lr_ratio,
        "plain": lr * loraplus_lr_ratio,
    }
    return optimizer_cls(
        [
            {
                "params": parameters,
                "lr": rates[name],
                "weight_decay": 0.0 if name == "plain" else loraplus_weight_decay,
            }
            for name, parameters in groups.items()
        ],
        lr=lr,
        **kwargs,
    )


def _kinds(model: nn.Module) -> tuple[set[int], set[int]]:
    """(ids of adapters' parameters on embeddings, ids of norms' parameters)."""
    on_embeddings, of_norms = set(), set()
    for module in model.modules():
        if isinstance(module, Adapted) and module.base.site.kind == "embedding":
            on_embeddings |= {
                id(t)
                for adapter in module.adapters
                for name, t in module.tensors(adapter).items()
                if name in ("A", "B", "m")
            }
        if isinstance(module, tuple(ALL_LAYERNORM_LAYERS)):
            of_norms |= {id(p) for p in module.parameters()}
    return on_embeddings, of_norms
