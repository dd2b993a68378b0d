"""Whether an adapter can be served right beside others: refused with the reason, never answered by the base."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from peft_dist import checkpoint
from peft_dist.adapted import AdapterModule
from peft_dist.contract import Method, PromptMethod, WeightMethod
from peft_dist.errors import PeftDistError, RowsError
from peft_dist.pool import outer_modules

from .engine import AdapterRefused

GENERATES = (None, "CAUSAL_LM")


def read_servable(
    directory: Path, base: Any, tasks: Collection[str | None] = GENERATES
) -> checkpoint.SavedAdapter:
    """An adapter's config and tensors, read and checked without touching the base.

    Args:
        tasks: that the base is loaded for, by PEFT's names; None: adapters that name none.

    Raises:
        AdapterRefused: it holds numbers that are none, or is of a kind that cannot answer beside others.
        PeftDistError: its files are damaged.
    """
    saved = checkpoint.read(directory)
    config: Any = saved.config
    task = getattr(config.task_type, "value", config.task_type)
    if task not in tasks:
        here = ", ".join(each for each in tasks if each)
        raise AdapterRefused(f"it is of task {task}, and this endpoint's base is loaded for {here}.")
    kind = config.peft_type
    if not isinstance(config, Method):
        raise AdapterRefused(f"{kind} is given by hooks of its own, which know of no batches.")
    if config.reads and not isinstance(config, PromptMethod):
        raise AdapterRefused(
            f"{kind} needs {', '.join(config.reads)} with each request, which no request of an endpoint has."
        )
    if type(config).ahead is not Method.ahead:
        raise AdapterRefused(f"{kind} runs the base once ahead of each run; it cannot join a batch.")
    if type(config).replace_base is not Method.replace_base or getattr(config, "start", "") == "loftq":
        raise AdapterRefused(
            f"{kind} as it was started changes the base's own weights, which others are served from. "
            "Merge it into a base of its own, or save it as a plain LoRA."
        )
    for name, tensor in saved.tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterRefused(f"{name} holds numbers that are not finite.")
    return saved


def check_placed(model: Any, adapter: str) -> None:
    """Whether an adapter that was put on the base can serve a packed row.

    Raises:
        AdapterRefused: it sits on nothing, or on a layer whose rows cannot be told apart.
    """
    if (method := model.methods.get(adapter)) is not None:
        try:
            method.embeds(dict(model.tensors(adapter)))
        except RowsError as error:
            raise AdapterRefused(f"{error} No request of an endpoint has them.") from error
    modules = model._adapters.sites.get(adapter, {})
    if not modules and adapter not in model.adapters:
        raise AdapterRefused("none of the base's modules is what it was trained on.")
    for name, module in modules.items():
        if module.base.is_argument:
            raise AdapterRefused(
                f"{name}: its weight is used as a function's argument, so that many adapters cannot share a batch."
            )


def check_blend(model: Any, adapters: Sequence[str]) -> None:
    """Whether adapters can be summed.

    Raises:
        AdapterRefused: one does not add to its layers' weights.
    """
    for adapter in adapters:
        if adapter in model.adapters:
            raise AdapterRefused(f"{adapter!r} puts tokens before the prompt, which have no weighted sum.")
        for name, module in outer_modules(model.get_base_model()):
            if not isinstance(module, AdapterModule) or adapter not in module.methods:
                continue
            if not isinstance(module.methods[adapter], WeightMethod):
                raise AdapterRefused(
                    f"{adapter!r} does more at {name} than to add to its weight, so it has no weighted sum with others."
                )


def put_sum(model: Any, adapter: str, parts: Sequence[tuple[str, float]]) -> None:
    """Puts a weighted sum of adapters on the base as one more, as far as `add_weighted_adapter` goes.

    Raises:
        AdapterRefused: they have no sum as one adapter.
    """
    names, weights = [name for name, _ in parts], [weight for _, weight in parts]
    kinds = {str(model.peft_config[name].peft_type.value) for name in names}
    if len(kinds) > 1:
        raise AdapterRefused(f"adapters of {' and '.join(sorted(kinds))} have no sum as one adapter.")
    exact = {"combination_type": "cat"} if kinds == {"LORA"} else {}
    try:
        model.add_weighted_adapter(names, weights, adapter, **exact)
    except (PeftDistError, AttributeError) as error:
        raise AdapterRefused(str(error)) from error
    model.eval()
