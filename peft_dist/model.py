"""PeftModel: a base with adapters, by HF PEFT's names. Thin: what it does is in the files that it calls."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from peft_dist import checkpoint, inject
from peft_dist.config import PeftConfig
from peft_dist.contract import PromptMethod
from peft_dist.errors import AdapterError, CheckpointError, ConfigError, suggest
from peft_dist.prompts import PromptedModel
from peft_dist.rows import BASE, Rows
from peft_dist.sharding import refuse_foreign_engine
from peft_dist.tuner import BaseTuner


class PeftModel(PromptedModel):
    """A base with adapters.

    Args:
        model: the base; wrapped in place and frozen.
        peft_config: of the first adapter, or None for a base that gets adapters later.
        adapter_name: of the first adapter.
        autocast_adapter_dtype: adapters on a half-precision base are fp32.
        low_cpu_mem_usage: makes the adapter's tensors on meta.

    Attributes:
        base_model: the base with its wrapped layers. peft_config: name -> config. active_adapters: names.
    """

    task_type: str | None = None

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__(inject.Adapters())
        self.base_model: Any = BaseTuner(model, self.peft_config, self._adapters)
        if peft_config is None:
            inject.freeze(model)
            return
        self._add(adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage, start=True)
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

    # --- adapters

    @property
    def active_adapter(self) -> str:
        """The first active adapter's name."""
        if not self.active_adapters:
            raise AdapterError("no adapter is active. Add or load one, or call set_adapter.")
        return self.active_adapters[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        """The first active adapter's config."""
        return self.peft_config[self.active_adapter]

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds an adapter; it is not active until `set_adapter`. A collective over a partitioned base.

        Raises:
            AdapterError: the name is taken or malformed. TargetError: its targets do not fit. The model is
            then as it was.
        """
        self._add(adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage, start=True)
        self.set_requires_grad(adapter_name, False)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes one adapter, or several, active; only active ones are trained, and none in
        `inference_mode`."""
        names = self._known(adapter_name)
        self.active_adapters = names
        inject.activate(self.get_base_model(), names)
        self.set_requires_grad([name for name in self.peft_config if name not in names], False)
        self.set_requires_grad(names, not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Lets adapters be trained, or not, whether they are active or not."""
        names = self._known(adapter_names)
        inject.set_requires_grad(self.get_base_model(), names, requires_grad)
        for holder in (self, self.base_model):
            for name in set(names) & set(holder.adapters):
                for key, param in holder.wanted(name).items():
                    holder.tensors(name)[key].requires_grad_(requires_grad and param.trainable)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter and its tensors; the first of the others becomes active where none is left so.

        Raises:
            AdapterError: there is none of this name, or it is merged.
        """
        self._known(adapter_name)
        inject.delete(self.get_base_model(), adapter_name)
        for holder in (self, self.base_model):
            if adapter_name in holder.adapters:
                holder.drop(adapter_name)
        self._adapters.sites.pop(adapter_name, None)
        self.base_model.controllers.pop(adapter_name, None)
        del self.peft_config[adapter_name]
        if adapter_name in self.active_adapters:
            left = [name for name in self.active_adapters if name != adapter_name]
            left = left or list(self.peft_config)[:1]
            self.active_adapters = left
            inject.activate(self.get_base_model(), left)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the context the bare base serves; merged adapters are unmerged for its time."""
        modules = [module for _, module in inject.adapter_modules(self.get_base_model())]
        before = [module.disabled for module in modules]
        merged = next((list(module.merged_adapters) for module in modules if module.merged_adapters), [])
        if merged:
            self.base_model.unmerge_adapter()
        own, self.disabled = self.disabled, True
        for module in modules:
            module.disabled = True
        try:
            yield
        finally:
            self.disabled = own
            for module, state in zip(modules, before, strict=True):
                module.disabled = state
            if merged:
                self.base_model.merge_adapter(merged)

    def get_base_model(self) -> Any:
        """The base itself, with its wrapped layers in it."""
        return self.base_model.model

    def adapter_tensors(self, adapter_name: str = "default") -> dict[str, nn.Parameter]:
        """Every Parameter of an adapter by its name in a checkpoint."""
        (name,) = self._known(adapter_name)
        return checkpoint.adapter_parameters(self, name)

    # --- what runs

    @contextlib.contextmanager
    def using(self, rows: Rows) -> Iterator[None]:
        """Within the context `rows` say which adapters and which dropout masks serve each sequence. Wrap the
        backward too where layers are recomputed in it.

        Raises:
            AdapterError: rows name an adapter that the model does not have.
        """
        names = {s.adapter for s in rows.segments} - {None, BASE}
        self._known([str(name) for name in names])
        current = self._adapters.current
        before = dataclasses.replace(current)
        current.rows, current.length, current.padding = rows, None, None
        try:
            yield
        finally:
            current.take(before)

    def forward(self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """The base's forward with its adapters. `adapter_names` names one per sequence, as `Rows.adapters`
        does."""
        with self._naming(adapter_names):
            sized = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
            if isinstance(sized, Tensor) and sized.ndim > 1:
                self._adapters.current.length = sized.shape[1]
            if self._prompting() or self._others_may_prompt():
                args, kwargs = (), self._prompted(self._bound(args, kwargs))
                self._adapters.current.length = kwargs["inputs_embeds"].shape[1]
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """The base's generate with its adapters."""
        with self._naming(adapter_names), self.base_model.reading(kwargs):
            if self._prompting():
                return self._generate_prompted(args, kwargs)
            return self.get_base_model().generate(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turns gradient checkpointing on; the embeddings' output then requires a gradient, without which a
        checkpointed layer under a frozen base would give its adapters none."""
        base = self.get_base_model()
        base.gradient_checkpointing_enable(*args, **kwargs)
        base.enable_input_require_grads()

    # --- storage

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Any = None,
        **kwargs: Any,
    ) -> None:
        """Writes complete HF PEFT directories: the adapter `default` into the directory itself, others into
        folders of their names. To be called on all ranks; rank 0 writes.

        Args:
            kwargs: `save_embedding_layers` and `is_main_process`, as in `checkpoint.save`.
        """
        if not safe_serialization:
            raise ConfigError(
                "save_pretrained: safe_serialization=False would write a pickle; only safetensors are."
            )
        checkpoint.save(self, save_directory, selected_adapters, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """A base with the adapter that a directory, an fsspec URL or a hub id holds.

        Args:
            kwargs: `revision`, `subfolder`, `token`, `key_mapping`, as in `checkpoint.read`.

        Raises:
            ConfigError, CheckpointError: it holds no adapter that fits; names the tensor. The base is as it
                was.
        """
        saved = checkpoint.read(model_id, **kwargs)
        config = config or saved.config
        chosen = TASK_CLASSES.get(config.task_type, PeftModel) if cls is PeftModel else cls
        peft_model = chosen(model, None)
        peft_model._load(
            saved.tensors, config, adapter_name, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage
        )
        return peft_model

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        """Adds the adapter that a directory, an fsspec URL or a hub id holds; active if it is the first.

        Args:
            kwargs: `revision`, `subfolder`, `token`, `key_mapping`, as in `checkpoint.read`.

        Raises:
            ConfigError, TargetError, CheckpointError: it does not fit; the model is as it was.
        """
        saved = checkpoint.read(model_id, **kwargs)
        self._load(
            saved.tensors, saved.config, adapter_name, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage
        )

    def _load(
        self,
        tensors: dict[str, Tensor],
        config: PeftConfig,
        name: str,
        is_trainable: bool,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
    ) -> None:
        config.inference_mode = not is_trainable
        self._add(name, config, autocast_adapter_dtype, low_cpu_mem_usage, start=False)
        try:
            result = checkpoint.load_state_dict(self, tensors, name)
            for what, keys in (
                ("lacks", result.missing_keys),
                ("has, unknown here,", result.unexpected_keys),
            ):
                if keys:
                    raise CheckpointError(
                        f"adapter {name!r}: the checkpoint {what} {len(keys)} tensors, the first "
                        f"{keys[0]!r}. It belongs "
                        "to another base or to other targets."
                    )
        except BaseException:
            self.delete_adapter(name)
            raise
        if len(self.peft_config) == 1:
            self.set_adapter(name, inference_mode=not is_trainable)
        else:
            self.set_requires_grad(name, is_trainable and name in self.active_adapters)
        if not is_trainable and self.training:
            self.eval()

    # --- counts

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(elements that are trained, all elements), partitioned ones counted whole."""
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in self.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Prints HF PEFT's line of both counts."""
        trained, every = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: "
            f"{100 * trained / every:.4f}"
        )

    def __getattr__(self, attribute: str) -> Any:
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            if attribute == "base_model":
                raise
            return getattr(self.base_model, attribute)

    # --- within

    def _known(self, names: str | Sequence[str]) -> list[str]:
        wanted = [names] if isinstance(names, str) else list(names)
        for name in wanted:
            if name not in self.peft_config:
                raise AdapterError(
                    f"adapter {name!r}: the model has none of this name."
                    f"{suggest(name, self.peft_config)} It has: {', '.join(self.peft_config) or 'none'}."
                )
        return wanted

    def _add(
        self, name: str, config: PeftConfig, autocast: bool, low_cpu_mem_usage: bool, start: bool
    ) -> None:
        inject.check_name(name, self.peft_config)
        refuse_foreign_engine(self, f"adapter {name!r} cannot be added")
        base = self.get_base_model()
        for place, module in inject.adapter_modules(base):
            if module.merged_adapters:
                raise AdapterError(
                    f"{place}: {module.merged_adapters} are merged. Unmerge before adding {name!r}."
                )
        if isinstance(config, PromptMethod):
            self._check_prompt(config)
        inject.inject(
            base,
            config,
            name,
            self._adapters,
            autocast_adapter_dtype=autocast,
            low_cpu_mem_usage=low_cpu_mem_usage,
            start=start,
        )
        if isinstance(config, PromptMethod):
            self._add_prompt(name, config, low_cpu_mem_usage, start)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = (
                getattr(getattr(base, "config", None), "_name_or_path", None) or None
            )
        if config.task_type is None and config.auto_mapping is None:
            config.auto_mapping = {
                "base_model_class": type(base).__name__,
                "parent_library": type(base).__module__,
            }
        self.peft_config[name] = config
        self.base_model.add_controller(name)
        inject.activate(base, self.active_adapters)

    @contextlib.contextmanager
    def _naming(self, adapter_names: Sequence[str | None] | None) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        rows = self._adapters.current.rows or Rows()
        with self.using(dataclasses.replace(rows, adapters=tuple(adapter_names))):
            yield


# task type -> class; filled by `tasks`.
TASK_CLASSES: dict[str | None, type[PeftModel]] = {}


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

    Raises:
        ConfigError, TargetError, AdapterError: the config does not fit; the model is then as it was.
    """
    if any(True for _ in inject.adapter_modules(model)):
        warnings.warn(
            "get_peft_model: the model has adapters already. Unload them first, or use add_adapter.",
            stacklevel=2,
        )
    if revision is not None:
        peft_config.revision = revision
    chosen = TASK_CLASSES.get(MIXED if mixed else peft_config.task_type, PeftModel)
    return chosen(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


# The key of the class that `mixed=True` asks for.
MIXED = "MIXED"


def inject_adapter_in_model(
    peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default", low_cpu_mem_usage: bool = False
) -> nn.Module:
    """`model` itself with an adapter on its layers, active and trainable, and no class around it.

    Raises:
        ConfigError: a prompt method, which has no layers to sit on.
    """
    if peft_config.is_prompt_learning:
        raise ConfigError(
            f"{type(peft_config).__name__}: a prompt method cannot be injected. Use get_peft_model."
        )
    taken = {name for _, module in inject.adapter_modules(model) for name in module.adapters}
    inject.check_name(adapter_name, taken)
    shared = (
        next((inject.Adapters(m._pool, m._current) for _, m in inject.adapter_modules(model)), None)
        or inject.Adapters()
    )
    inject.inject(model, peft_config, adapter_name, shared, low_cpu_mem_usage=low_cpu_mem_usage)
    inject.activate(model, [adapter_name])
    return model


def get_peft_model_state_dict(
    model: PeftModel,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors, whole, by their names in a checkpoint; a collective where some are sharded.

    Args:
        state_dict: the whole model's, where another library has gathered it.
    """
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    return checkpoint.state_dict(model, adapter_name, state_dict, save_embedding_layers)


def set_peft_model_state_dict(
    model: PeftModel,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
) -> checkpoint.LoadResult:
    """Fills an adapter that the model has from tensors by their names in a checkpoint; says which names did
    not meet.

    Raises:
        CheckpointError: a shape differs, or no name is known; nothing is changed.
    """
    return checkpoint.load_state_dict(model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes)
