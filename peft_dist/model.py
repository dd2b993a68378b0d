"""PeftModel: a base with adapters, by HF PEFT's names. Thin: what it does is in the files that it calls."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_dist import checkpoint, inject
from peft_dist.arithmetic import convert
from peft_dist.base_layer import num_elements
from peft_dist.catalog import METHODS, prefix_of
from peft_dist.config import PeftConfig
from peft_dist.contract import Method, PromptMethod
from peft_dist.errors import AdapterError, CheckpointError, ConfigError, MergeError, RowsError
from peft_dist.folder import upload_to_hub
from peft_dist.foreign_engine import refuse_foreign_engine
from peft_dist.hooks import without_hooked
from peft_dist.lazy import lazy
from peft_dist.merge import is_dequantised, refuse_unmergeable
from peft_dist.pooled import outer_modules
from peft_dist.prompts import PromptedModel
from peft_dist.prompts.generation import rows_each
from peft_dist.ranks import is_writer
from peft_dist.rows import BASE, Rows, token_input
from peft_dist.sharding import set_whole
from peft_dist.tuner import BaseTuner, tuner_class
from peft_dist.tuner_layer import hooked_layers

# It knows of models, and is loaded when it is asked.
status = lazy("peft_dist.status")
# It knows of checkpoints of whole models.
gathered = lazy("peft_dist.merged.gathered")


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
        super().__init__(inject.beside_others(model))
        self.base_model: Any = BaseTuner.around(model, self.peft_config, self._adapters)
        if peft_config is None:
            inject.freeze(model)
            return
        # Of the adapter that it is made with, whatever comes to stand beside that one.
        self.peft_type = peft_config.peft_type
        self._add(adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage, start=True)
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

    # --- adapters

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that serve rows which name none, in the order in which they act."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str:
        """The first active adapter's name."""
        if not self.active_adapters:
            raise AdapterError("no adapter is active. Add or load one, or call set_adapter.")
        return self.active_adapters[0]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter serves rows which name none: false within `disable_adapter`, and where none is active."""
        modules = [module for _, module in inject.adapter_modules(self.get_base_model())]
        all_disabled = bool(modules) and all(module.disabled for module in modules)
        return bool(self.active_adapters) and not self.disabled and not all_disabled

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

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> None:
        """Lets what the embeddings of `model` give require a gradient, without which layers that are
        recomputed under a frozen base would give their adapters none."""
        model.enable_input_require_grads()

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes one adapter, or several, active; only active ones are trained, and none in
        `inference_mode`."""
        self.base_model.set_adapter(adapter_name, inference_mode)
        names = self.active_adapters
        self._let_tokens_train([name for name in self.peft_config if name not in names], False)
        self._let_tokens_train(names, not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Lets adapters be trained, or not, whether they are active or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)
        self._let_tokens_train(self._known(adapter_names), requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter and its tensors; the first of the others becomes active where none is left so.

        Raises:
            AdapterError: there is none of this name, or it is merged.
        """
        self.base_model.delete_adapter(adapter_name)
        if adapter_name in self.adapters:
            self.drop(adapter_name)

    def _let_tokens_train(self, names: Sequence[str], requires_grad: bool) -> None:
        for name in names:
            self.let_train(name, requires_grad)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the context the bare base serves; merged adapters are unmerged for its time."""
        modules = [module for _, module in inject.adapter_modules(self.get_base_model())]
        before = [module.disabled for module in modules]
        layers = (*modules, *(layer for _, layer in hooked_layers(self.get_base_model())))
        merged = next((list(layer.merged_adapters) for layer in layers if layer.merged_adapters), [])
        dequantize = is_dequantised(self.get_base_model())
        if merged:
            self.base_model.unmerge_adapter()
        own, self.disabled = self.disabled, True
        for module in modules:
            module.disabled = True
        try:
            with without_hooked(self.get_base_model()):
                yield
        finally:
            self.disabled = own
            for module, state in zip(modules, before, strict=True):
                module.disabled = state
            if merged:
                self.base_model.merge_adapter(merged, dequantize=dequantize)

    @property
    def base_model_torch_dtype(self) -> Any:
        """The dtype that the base was loaded in, or None where it does not say."""
        return getattr(self.get_base_model(), "dtype", None)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The modules that are trained whole beside any adapter."""
        names = {
            name for c in self.peft_config.values() for name in getattr(c, "modules_to_save", None) or ()
        }
        return names or None

    def get_base_model(self) -> Any:
        """The base itself, with its wrapped layers in it."""
        return self.base_model.model

    def adapter_tensors(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """Every Parameter of an adapter by its name in a checkpoint."""
        (name,) = self._known(adapter_name)
        return checkpoint.adapter_parameters(self, name)

    def keep_base(self) -> None:
        """From now on the base's weights stay as they are: what the start of an adapter would change of them
        (LoftQ's) stands beside its layers, in their dtype, and serves the rows of that adapter alone."""
        self._adapters.pool.keeps_base = True

    # --- what runs

    @contextlib.contextmanager
    def using(self, rows: Rows) -> Iterator[None]:
        """Within the context `rows` say which adapters and which dropout masks serve each sequence, also in
        layers that the backward runs again later.

        Raises:
            AdapterError: rows name an adapter that the model does not have.
        """
        self._known(sorted(rows.named))
        current = self._adapters.current
        before = dataclasses.replace(current)
        current.rows, current.length, current.padding = rows, None, None
        measuring = self.get_base_model().register_forward_pre_hook(self._measure, with_kwargs=True)
        try:
            yield
        finally:
            measuring.remove()
            current.take(before)

    def _measure(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Notes how many positions the base is given now, at each of its calls: `generate` makes many."""
        sized = token_input(args, kwargs)
        if isinstance(sized, Tensor) and sized.ndim > 1:
            self._adapters.current.length = sized.shape[1]

    def forward(self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """The base's forward with its adapters. `adapter_names` names one per sequence, as `Rows.adapters`
        does."""
        self._check_names(adapter_names, args, kwargs)
        with self._naming(adapter_names):
            if self.adapters and torch.is_grad_enabled():
                self._constrain()
            if self._prompting() or self._others_may_prompt():
                return self._forward_prompted(args, kwargs)
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """The base's generate with its adapters."""
        self._check_names(adapter_names, args, kwargs)
        with self._naming(adapter_names), self.base_model.reading(kwargs):
            if self._prompting():
                return self._generate_prompted(args, kwargs)
            self.base_model.look_ahead.leave_cache(kwargs)
            with self._named_again(rows_each(self.get_base_model(), kwargs)):
                return self.get_base_model().generate(*args, **kwargs)

    @contextlib.contextmanager
    def _named_again(self, times: int) -> Iterator[None]:
        """Each row's name said for all the rows that `generate` makes of it: all but an encoder gets those."""
        given, base = self._adapters.current.rows, self.get_base_model()
        if given is None or given.adapters is None or times == 1:
            yield
            return
        names = tuple(name for name in given.adapters for _ in range(times))
        made = dataclasses.replace(given, adapters=names)
        encoder = base.get_encoder() if base.config.is_encoder_decoder else nn.Module()

        def serve(rows: Rows, *_: Any) -> None:
            self._adapters.current.rows = rows

        before = encoder.register_forward_pre_hook(lambda *_: serve(given))
        after = encoder.register_forward_hook(lambda *_: serve(made), always_call=True)
        try:
            with self.using(made):
                yield
        finally:
            before.remove()
            after.remove()

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turns gradient checkpointing on; the embeddings' output then requires a gradient, without which a
        checkpointed layer under a frozen base would give its adapters none."""
        base = self.get_base_model()
        base.gradient_checkpointing_enable(*args, **kwargs)
        base.enable_input_require_grads()

    def _apply(self, fn: Any, recurse: bool = True) -> PeftModel:
        # Whoever moves the model to a device, as a DeepSpeed engine does, finds adapters there that can train.
        if self._adapters.pool.waiting and inject.leaves_meta(fn) and not _is_on_meta(self.get_base_model()):
            inject.start_waiting(self)
        super()._apply(fn, recurse)
        return self

    # --- storage

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool | None = None,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes complete HF PEFT directories: the adapter `default` into the directory itself, others into
        folders of their names. To be called on all ranks; rank 0 writes.

        Args:
            save_embedding_layers: add the base's embeddings; "auto" where an adapter sits on them, or where the
                vocabulary was resized.
            is_main_process: whether this process writes; by default rank 0 of the default group does.
            path_initial_model_for_weight_conversion: of the adapter as it started from the base's own directions;
                a plain LoRA of twice the rank is written, for the base as it is.
            state_dict: the whole model's, where another library has gathered it.
        """
        if not safe_serialization:
            raise ConfigError(
                "save_pretrained: safe_serialization=False would write a pickle; only safetensors are."
            )
        if path_initial_model_for_weight_conversion is not None:
            kwargs["convert"] = convert.to_plain(path_initial_model_for_weight_conversion)
        checkpoint.save(
            self,
            save_directory,
            selected_adapters,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            whole_model=state_dict,
            **kwargs,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Uploads the adapters to the Hugging Face hub, as `save_pretrained` writes them, and nothing of the base. To
        be called on all ranks; rank 0 uploads.

        Args:
            repo_id: NAME or ORGANISATION/NAME; made where it is absent, `private` or not.
            revision: the branch. create_pr: open a pull request instead of committing.
            max_shard_size: of a model's files; an adapter is one file, whatever it says.
            tags: more of them for the card.
            kwargs: of `save_pretrained`.

        Returns:
            what `huggingface_hub.HfApi.upload_folder` returns; None on ranks that do not upload.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            if not is_writer(kwargs.get("is_main_process")):
                return None
            if tags:
                checkpoint.write_card(Path(folder), self.active_peft_config, self.get_base_model(), tags)
            return upload_to_hub(
                Path(folder),
                repo_id,
                commit_message or "Upload model",
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_description=commit_description,
            )

    def save_merged(
        self,
        save_directory: str | Path,
        max_shard_size: int | str = "5GB",
        *,
        adapter_names: str | Sequence[str] | None = None,
        dtype: Any = None,
        tokenizer: Any = None,
        is_main_process: bool | None = None,
    ) -> None:
        """Writes the base with adapters in its weights as an ordinary Hugging Face checkpoint: safetensors files, their
        index, config, generation config and tokenizer, which `AutoModel*.from_pretrained` opens. The model stays as it
        is.

        To be called on all ranks where the base is partitioned: each layer is gathered alone, and one rank writes. What
        is written appears when it is whole. Quantised layers are written dequantised, merged in what they compute in.

        Args:
            max_shard_size: of one file: `5GB`, `500MB`, or bytes.
            adapter_names: in the order in which they act; the active ones, or those that are merged, by default.
            dtype: of the floating weights, such as `torch.bfloat16`; by default each tensor's own.
            tokenizer: saved with it; by default that of the directory or hub id that the base is from.
            is_main_process: whether this process writes; by default rank 0 of the default group does.

        Raises:
            AdapterError: there is no such adapter.
            MergeError: one cannot be merged, a checkpoint of this architecture cannot hold the result, or it cannot be
                written; `save_directory` is then as it was.
        """
        names = self._to_merge(adapter_names)
        origin = {
            "base": self.peft_config[names[0]].base_model_name_or_path,
            "adapters": {name: str(self.peft_config[name].peft_type) for name in names},
        }
        gathered.save_merged(
            self.get_base_model(),
            names,
            save_directory,
            max_shard_size=max_shard_size,
            dtype=dtype,
            tokenizer=tokenizer,
            is_main_process=is_main_process,
            origin=origin,
        )

    def _to_merge(self, adapter_names: str | Sequence[str] | None) -> list[str]:
        """The adapters that are meant; refuses those that no weight can hold."""
        base = self.get_base_model()
        merged = next((m.merged_adapters for _, m in inject.adapter_modules(base) if m.merged_adapters), None)
        names = list(merged or self.active_adapters) if adapter_names is None else self._known(adapter_names)
        names = list(dict.fromkeys(names))
        if not names:
            raise AdapterError(
                "save_merged: no adapter is active. Call set_adapter, or name some by adapter_names."
            )
        refuse_unmergeable(self.peft_config, names)
        hooked = [name for name in names if has_hooks(self.peft_config[name].peft_type)]
        if hooked:
            raise MergeError(
                f"adapter {hooked[0]!r}: {self.peft_config[hooked[0]].peft_type} is given by hooks of its own, which "
                "change the base in place. Call merge_and_unload, and save the model that it gives."
            )
        inject.check_together(base, names)
        return names

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """A base with the adapter that a directory, an fsspec URL or a hub id holds.

        Args:
            config: in the place of the adapter's own.
            ephemeral_gpu_offload: as in `LoraRuntimeConfig`.
            key_mapping: regular expressions on names in the file, and what to put there.
            kwargs: as in `load_adapter`; of X-LoRA also `adapters`, where the adapters that it mixes are now.

        Raises:
            ConfigError, CheckpointError: it holds no adapter that fits; names the tensor. The base is as it
                was.
        """
        adapters = kwargs.pop("adapters", None)
        kwargs.pop("torch_device", None)
        ignore = kwargs.pop("ignore_mismatched_sizes", False)
        if config is not None and not isinstance(config, PeftConfig):
            raise ConfigError(f"The input config must be a PeftConfig, got {type(config)}.")
        saved = checkpoint.read(model_id, key_mapping=key_mapping, **_where_it_is(kwargs))
        config = config or saved.config
        if adapters is not None:
            if not hasattr(config, "adapters"):
                raise ConfigError(
                    f"from_pretrained: adapters is an argument of XLORA; the one there is {config.peft_type}."
                )
            config.adapters = dict(adapters)
            config.__dict__.pop("home", None)
        if ephemeral_gpu_offload and hasattr(config, "runtime_config"):
            config.runtime_config.ephemeral_gpu_offload = True
        chosen = TASK_CLASSES.get(config.task_type, PeftModel) if cls is PeftModel else cls
        with as_it_was(model):
            peft_model = chosen(model, None)
            peft_model._load(
                saved.tensors,
                config,
                adapter_name,
                is_trainable,
                autocast_adapter_dtype,
                low_cpu_mem_usage,
                ignore,
            )
        return peft_model

    def load_adapter(
        self,
        model_id: str | Path | checkpoint.SavedAdapter,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> checkpoint.LoadResult:
        """Adds the adapter that a directory, an fsspec URL or a hub id holds; active if it is the first. Into an
        adapter of this name that the model has, with the same settings, its values are put.

        Args:
            model_id: where it is, or what `checkpoint.read` made of it.
            torch_device: where the tensors are read to; they end on their layers' device.
            ephemeral_gpu_offload: as in `LoraRuntimeConfig`.
            key_mapping: regular expressions on names in the file, and what to put there.
            ignore_mismatched_sizes: tensors of another shape keep the values that they start with; a warning
                names them.
            kwargs: `revision`, `subfolder`, `token`, `cache_dir` and so on, as in `checkpoint.read`. `device_map`
                and what goes with it have no effect: an adapter's tensors are where their layers are.

        Raises:
            AdapterError: the model has another adapter of this name. ConfigError, TargetError, CheckpointError:
                it does not fit. The model is as it was.
        """
        saved = model_id if isinstance(model_id, checkpoint.SavedAdapter) else None
        if saved is None:
            saved = checkpoint.read(model_id, key_mapping=key_mapping, **_where_it_is(kwargs))  # type: ignore[arg-type]
        if ephemeral_gpu_offload and hasattr(saved.config, "runtime_config"):
            saved.config.runtime_config.ephemeral_gpu_offload = True
        if adapter_name in self.peft_config:
            return self._refill(saved.tensors, saved.config, adapter_name, is_trainable)
        return self._load(
            saved.tensors,
            saved.config,
            adapter_name,
            is_trainable,
            autocast_adapter_dtype,
            low_cpu_mem_usage,
            ignore_mismatched_sizes,
        )

    def _refill(
        self, tensors: dict[str, Tensor], config: PeftConfig, name: str, is_trainable: bool
    ) -> checkpoint.LoadResult:
        if isinstance(config, PromptMethod):
            self._check_prompt(config)
        here, there = self.peft_config[name].to_dict(), config.to_dict()
        # AdaLoRA's ranks are what was learned, not a setting.
        learned = ("rank_pattern",) if config.peft_type == "ADALORA" else ()
        for key in (*_OF_NO_ACCOUNT, *learned):
            here.pop(key, None), there.pop(key, None)
        # Where the adapters that it mixes lie is no setting, which they are is one.
        mixes = isinstance(config, Method) and type(config).assemble is not Method.assemble
        for settings in (here, there) if mixes else ():
            settings["adapters"] = list(settings["adapters"])
        other = [key for key in here if _unordered(here[key]) != _unordered(there.get(key))]
        if other:
            raise AdapterError(
                f"adapter {name!r}: the model has one of this name with another {other[0]}: {here[other[0]]!r}, not "
                f"{there.get(other[0])!r}. Delete it first, or choose another name."
            )
        if config.peft_type == "ADALORA":
            self.peft_config[name].rank_pattern = config.rank_pattern  # type: ignore[attr-defined]
        parts = checkpoint.parts_of(self, config, name) if mixes else []
        result = checkpoint.load_state_dict(self, tensors, name)
        for tensor, value in parts:
            set_whole(tensor, value)
        _check_all_met(name, result)
        if not is_trainable and self.training:
            self.eval()
        return result

    def _load(
        self,
        tensors: dict[str, Tensor],
        config: PeftConfig,
        name: str,
        is_trainable: bool,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        ignore_mismatched_sizes: bool = False,
    ) -> checkpoint.LoadResult:
        config.inference_mode = not is_trainable
        self._told_by(tensors, config)
        self._add(name, config, autocast_adapter_dtype, low_cpu_mem_usage, start=False)
        try:
            result = checkpoint.load_state_dict(self, tensors, name, ignore_mismatched_sizes)
            if not ignore_mismatched_sizes:
                _check_all_met(name, result)
        except BaseException:
            self.delete_adapter(name)
            raise
        if len(self.peft_config) == 1:
            self.set_adapter(name, inference_mode=not is_trainable)
        else:
            self.set_requires_grad(name, is_trainable)
        if not is_trainable and self.training:
            self.eval()
        return result

    def _told_by(self, tensors: Mapping[str, Tensor], config: PeftConfig) -> None:
        """Adds to a config what only its file's tensors tell."""
        return None

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Writes the card of an adapter's directory; one that is there keeps its text and gets the facts."""
        checkpoint.write_card(Path(output_dir), self.active_peft_config, self.get_base_model())

    # --- counts

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(elements that are trained, all elements): partitioned ones counted whole, packed 4-bit ones two to
        a byte."""
        sizes = [(num_elements(p), p.requires_grad) for p in self.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Prints HF PEFT's line of both counts."""
        trained, every = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: "
            f"{100 * trained / every:.4f}"
        )

    def get_layer_status(self) -> list[Any]:
        """`peft_dist.get_layer_status` of this model."""
        return status.get_layer_status(self)

    def get_model_status(self) -> Any:
        """`peft_dist.get_model_status` of this model."""
        return status.get_model_status(self)

    def __getattr__(self, attribute: str) -> Any:
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            if attribute == "base_model":
                raise
            return getattr(self.base_model, attribute)

    # --- within

    def _known(self, names: str | Sequence[str]) -> list[str]:
        return self.base_model.known(names)

    def _add(
        self, name: str, config: PeftConfig, autocast: bool, low_cpu_mem_usage: bool, start: bool
    ) -> None:
        inject.check_name(name, self.peft_config)
        if start:
            _warn_of_prefix(name, config.peft_type)
        refuse_foreign_engine(self, f"adapter {name!r} cannot be added")
        base = self.get_base_model()
        for place, module in inject.adapter_modules(base):
            if module.merged_adapters:
                raise AdapterError(
                    f"{place}: {module.merged_adapters} are merged. Unmerge before adding {name!r}."
                )
        if isinstance(config, PromptMethod):
            self._check_prompt(config)
        self._check_together(name, config)
        if isinstance(config, PromptMethod):
            self._add_prompt(name, config, low_cpu_mem_usage, start)
        try:
            self._put(name, config, autocast, low_cpu_mem_usage, start)
        except BaseException:
            self.peft_config.pop(name, None)
            if name in self.adapters:
                self.drop(name)
            raise
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = (
                getattr(getattr(base, "config", None), "_name_or_path", None) or None
            )
        if config.task_type is None and config.auto_mapping is None:
            config.auto_mapping = {
                "base_model_class": type(base).__name__,
                "parent_library": type(base).__module__,
            }
        base.peft_config = self.peft_config
        inject.activate(base, self.active_adapters)
        if self._adapters.pool.waiting:
            inject.start_when_partitioned(self)

    def _check_together(self, name: str, config: PeftConfig) -> None:
        """A method given by hooks stands alone on a base."""
        others = {other.peft_type for other in self.peft_config.values()} - {config.peft_type}
        alone = [kind for kind in (config.peft_type, *others) if has_hooks(kind)]
        if others and alone:
            raise ConfigError(
                f"adapter {name!r}: {config.peft_type} cannot stand beside {', '.join(sorted(map(str, others)))}: "
                f"{alone[0]} is given by hooks of its own. Put it on another copy of the base."
            )

    def _put(
        self, name: str, config: PeftConfig, autocast: bool, low_cpu_mem_usage: bool, start: bool
    ) -> None:
        """Puts an adapter on layers; the first says which class the base stands in."""
        base, first = self.get_base_model(), not self.peft_config
        self.peft_config[name] = config
        if not first or config.is_prompt_learning:
            self.base_model.inject_adapter(base, name, autocast, low_cpu_mem_usage, start=start)
            return
        chosen = tuner_class(str(config.peft_type))
        if not chosen.has_hooks():
            self.base_model = chosen.around(base, self.peft_config, self._adapters)
            self.base_model.inject_adapter(base, name, autocast, low_cpu_mem_usage, start=start)
            return
        tuner = chosen(base, self.peft_config, name, low_cpu_mem_usage=low_cpu_mem_usage)
        tuner._cast_adapter_dtype(name, autocast)
        self.base_model, self.peft_config, self._adapters = tuner, tuner.peft_config, tuner._adapters

    def _check_names(
        self, adapter_names: Sequence[str | None] | None, args: tuple, kwargs: Mapping[str, Any]
    ) -> None:
        """Refuses a number of names that is not that of the rows: of the main input of a model of transformers, of any
        argument of another model."""
        if adapter_names is None:
            return
        main = getattr(self.get_base_model(), "main_input_name", None)
        given = (*args, *kwargs.values())
        if main is not None:
            given = (args[0] if args else None, *(kwargs.get(key) for key in (main, *_INPUTS)))
        rows = [len(each) for each in given if isinstance(each, Tensor) and each.ndim]
        # One row may be what all sequences share.
        fitting = {len(adapter_names)} if main is not None else {len(adapter_names), 1}
        if rows and not fitting & set(rows[:1] if main is not None else rows):
            raise RowsError(
                f"adapter_names: {len(adapter_names)} names for {rows[0]} rows. Name one for "
                f"each; '{BASE}' is the bare base."
            )

    @contextlib.contextmanager
    def _naming(self, adapter_names: Sequence[str | None] | None) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        rows = self._adapters.current.rows or Rows()
        with self.using(dataclasses.replace(rows, adapters=tuple(adapter_names))):
            yield


# What transformers' models are given to read, where it is not their main input.
_INPUTS = ("inputs", "input_ids", "inputs_embeds")
# What may differ between two adapters that are one: where they come from, and whether they are trained.
_OF_NO_ACCOUNT = (
    "inference_mode",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "task_type",
)


def _is_on_meta(base: nn.Module) -> bool:
    return any(
        p.is_meta for _, module in outer_modules(base) for p in module._parameters.values() if p is not None
    )


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def _where_it_is(told: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of a loading function those that say where an adapter is."""
    where = {key: value for key, value in told.items() if key not in _OF_THE_BASES_PLACE}
    if not where.pop("use_safetensors", True):
        raise ConfigError("use_safetensors=False would read a pickle; only safetensors are read.")
    if (token := where.pop("use_auth_token", None)) is not None:
        where.setdefault("token", token)
    return where


# They say where a base's layers are.
_OF_THE_BASES_PLACE = frozenset(
    {"device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"}
)


def _check_all_met(name: str, result: checkpoint.LoadResult) -> None:
    for what, keys in (("lacks", result.missing_keys), ("has, unknown here,", result.unexpected_keys)):
        if keys:
            raise CheckpointError(
                f"adapter {name!r}: the checkpoint {what} {len(keys)} tensors, the first {keys[0]!r}. It belongs to "
                "another base or to other targets."
            )


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Where the body fails, the base's parameters are trained, or not, as before, and so is its mode."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training, config = model.training, model.__dict__.get("peft_config")
    try:
        yield
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(training)
        if config is None:
            model.__dict__.pop("peft_config", None)
        raise


def _warn_of_prefix(name: str, peft_type: Any) -> None:
    prefix = prefix_of(str(peft_type)) if peft_type in METHODS else ""
    if prefix and name in prefix:
        warnings.warn(
            f"Adapter name {name!r} should not be contained in the prefix {prefix!r}: HF PEFT may initialise "
            "such an adapter anew when it loads it.",
            stacklevel=4,
        )


def has_hooks(peft_type: Any) -> bool:
    """Whether a method is given by HF PEFT's injection hooks."""
    row = METHODS.get(str(peft_type))
    return row is not None and row.tuner is not None


# task type -> class; filled by `tasks`.
TASK_CLASSES: dict[str | None, type[PeftModel]] = {}

# The key of the class that `mixed=True` asks for.
MIXED = "MIXED"
