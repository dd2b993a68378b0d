"""The functions by which programs put adapters on a base, and take them out of a model as tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from peft_dist import checkpoint, inject
from peft_dist.catalog import prefix_of
from peft_dist.config import PeftConfig
from peft_dist.errors import ConfigError, TargetError
from peft_dist.hooks import hooked_names
from peft_dist.model import MIXED, TASK_CLASSES, PeftModel, as_it_was, has_hooks
from peft_dist.targets import resolve
from peft_dist.tuner import tuner_class
from peft_dist.tuner_layer import BaseTunerLayer


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """`model` with an adapter on it, of the class of the config's task; changed in place and frozen.

    The config's `base_model_name_or_path` becomes the base's own name, with a warning where that is another.

    Args:
        mixed: for adapters of several methods, active together: a `PeftMixedModel`.
        autocast_adapter_dtype: adapters on a half-precision base are fp32.
        revision: of the base, kept in the config; with a warning where the config has another.
        low_cpu_mem_usage: makes the adapter's tensors on meta, for values that are loaded later.

    Raises:
        TaskError: a prompt method without one of the six tasks.
        ConfigError, TargetError, AdapterError: the config does not fit; the model is then as it was.
    """
    before, peft_config.base_model_name_or_path = (
        peft_config.base_model_name_or_path,
        # A model made from a config alone has an empty one.
        model.__dict__.get("name_or_path") or None,
    )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=2,
        )
    if before is not None and before != peft_config.base_model_name_or_path:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{before}' to "
            f"'{peft_config.base_model_name_or_path}'. Please ensure that the correct base model is loaded when "
            "loading this checkpoint.",
            stacklevel=2,
        )
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warnings.warn(
                f"the config has the base's revision {peft_config.revision!r}; it is now {revision!r}.",
                stacklevel=2,
            )
        peft_config.revision = revision
    with as_it_was(model):
        if mixed:
            return TASK_CLASSES[MIXED](model, peft_config, adapter_name)
        chosen = TASK_CLASSES.get(peft_config.task_type, PeftModel)
        return chosen(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """`model` itself with an adapter on its layers, active and trainable, and no class around it.

    Args:
        state_dict: a saved adapter, whose names say which layers, in the place of the config.

    Raises:
        ConfigError: a method that has no layers to sit on alone, or whose names are not in `state_dict`.
    """
    name = type(peft_config).__name__
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise ConfigError(f"{name}: a prompt method cannot be injected. Use get_peft_model.")
    if has_hooks(peft_config.peft_type):
        configs = {**getattr(model, "peft_config", {}), adapter_name: peft_config}
        tuner_class(str(peft_config.peft_type))(
            model, configs, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
        )
        return model
    taken = {name for _, module in inject.adapter_modules(model) for name in module.adapters}
    inject.check_name(adapter_name, taken)
    if taken:
        warnings.warn(
            f"The model has adapters already ({', '.join(sorted(taken))}): {adapter_name!r} is put beside them, and it "
            "alone is active.",
            stacklevel=2,
        )
    shared = next(
        (inject.Adapters(m._pool, m._current) for _, m in inject.adapter_modules(model)), inject.Adapters()
    )
    placed: Any = peft_config
    if state_dict is not None:
        placed = copy.copy(peft_config)
        names = hooked_names(state_dict, prefix_of(str(peft_config.peft_type)))
        if not names:
            raise ConfigError(f"{name}: no name of the state_dict is of a tensor of {peft_config.peft_type}.")
        _say_other_layers(model, peft_config, set(names))
        placed.target_modules, placed.exclude_modules = set(names), None
    with as_it_was(model):
        inject.inject(model, placed, adapter_name, shared, low_cpu_mem_usage=low_cpu_mem_usage)
    inject.activate(model, [adapter_name])
    model.peft_config = {**getattr(model, "peft_config", {}), adapter_name: peft_config}  # type: ignore[assignment]
    return model


def _say_other_layers(model: nn.Module, peft_config: PeftConfig, names: set[str]) -> None:
    """Where a config means other layers than a state_dict has tensors of."""
    facts = inject.facts_of(model, inject.places(model))
    try:
        meant = set(resolve(copy.copy(peft_config), facts))
    except TargetError:
        meant = set()
    for what, others in (("config means", meant - names), ("state_dict has tensors of", names - meant)):
        if others:
            warnings.warn(
                f"inject_adapter_in_model: the {what} {len(others)} more layers, the first {min(others)!r}. The "
                "state_dict says which layers get an adapter.",
                RuntimeWarning,
                stacklevel=3,
            )


def get_peft_model_state_dict(
    model: PeftModel,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors, whole, by their names in a checkpoint; a collective where some are sharded. Those of an
    adapter that rests on meta are there without values.

    Args:
        state_dict: the whole model's, where another library has gathered it.
    """
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    model = getattr(model, "_fsdp_wrapped_module", model)
    if state_dict is None and any(
        t.is_meta for t in checkpoint.adapter_parameters(model, adapter_name).values()
    ):
        state_dict = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return checkpoint.state_dict(model, adapter_name, state_dict, save_embedding_layers)


def set_peft_model_state_dict(
    model: PeftModel,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> checkpoint.LoadResult:
    """Fills an adapter that the model has from tensors by their names in a checkpoint; says which names did
    not meet. Tensors that rest on meta get memory, whatever `low_cpu_mem_usage` says.

    Raises:
        CheckpointError: a shape differs, or no name is known; nothing is changed.
    """
    return checkpoint.load_state_dict(model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes)
