"""Whether an adapter can be served right beside others: refused with the reason, never answered by the base."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from orchestrator.train.rows.task_ids import ARGUMENT, SIZES
from peft_dist import checkpoint
from peft_dist.adapted import AdapterModule
from peft_dist.ahead import looks_ahead
from peft_dist.contract import Method, PromptMethod, WeightMethod
from peft_dist.errors import PeftDistError
from peft_dist.pauses import pause
from peft_dist.pooled import outer_modules

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
    needed = [name for name in config.reads if name != ARGUMENT]
    if needed and not looks_ahead(config) and not isinstance(config, PromptMethod):
        raise AdapterRefused(
            f"{kind} needs {', '.join(needed)} with each request, which no request of an endpoint has."
        )
    for name, tensor in saved.tensors.items():
        pause()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterRefused(f"{name} holds numbers that are not finite.")
    return saved


def num_tasks(config: Any) -> int:
    """How many tasks an adapter learned, of which each request names one; 0 for one that learned no several."""
    if ARGUMENT not in getattr(config, "reads", ()):
        return 0
    return next(int(getattr(config, name)) for name in SIZES if hasattr(config, name))


def put_on(model: Any, saved: checkpoint.SavedAdapter, adapter: str) -> None:
    """Puts an adapter that was read on the base.

    Raises:
        PeftDistError: it does not fit; the model is as it was.
    """
    config = model.get_base_model().config
    before = config.use_cache if looks_ahead(saved.config) and hasattr(config, "use_cache") else None
    if before is not None:
        # Asked of a base that others run: whoever runs such an adapter sees to it by the call.
        config.use_cache = False
    try:
        model.load_adapter(saved, adapter, autocast_adapter_dtype=False)
    finally:
        if before is not None:
            config.use_cache = before


def check_on_something(model: Any, adapter: str) -> None:
    """Raises AdapterRefused where an adapter that was put on the base sits on nothing."""
    if not model._adapters.sites.get(adapter) and adapter not in model.adapters:
        raise AdapterRefused("none of the base's modules is what it was trained on.")


def check_placed(model: Any, adapter: str) -> None:
    """Whether an adapter that was put on the base can serve rows of a batch.

    Raises:
        AdapterRefused: it sits on nothing, or on a layer whose rows cannot be told apart.
    """
    check_on_something(model, adapter)
    for name, module in model._adapters.sites.get(adapter, {}).items():
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
            if not isinstance(module.methods[adapter], WeightMethod) or module.base.is_argument:
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
