"""What every method's config has: HF PEFT's common fields, and the way to and from `adapter_config.json`.

A config is the method: its fields are the public ones, its functions are in `contract`. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist.catalog import PeftType, TaskType, config_class
from peft_dist.errors import ConfigError, TypelessError, suggest
from peft_dist.lazy import lazy

if TYPE_CHECKING:
    from peft_dist.contract import BaseSizes

huggingface_hub, folders = lazy("huggingface_hub"), lazy("peft_dist.folder")

CONFIG_NAME = "adapter_config.json"
# The version of HF PEFT whose files are written.
PEFT_VERSION = "0.21.2"
MIN_EXPECTED_CONFIG_KEYS = frozenset({"peft_type"})


@dataclass
class PeftConfig:
    """The fields that all methods share.

    Args:
        task_type: one of `TaskType`, or None: the model is wrapped without a task.
        peft_type: the method's name; each class sets its own.
        auto_mapping: class and module of a base without a task type, as HF PEFT writes them.
        peft_version: of the library that wrote the config.
        base_model_name_or_path: the base that the adapter belongs to.
        revision: of that base.
        inference_mode: loaded for inference: nothing of it is trained.
    """

    task_type: str | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, str] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    # Fields that say how a program runs, not what the adapter is: never in a file.
    at_runtime: ClassVar[frozenset[str]] = frozenset({"runtime_config"})
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in TaskType.__members__:
            raise ConfigError(
                f"task_type: {self.task_type!r} is not one of {', '.join(TaskType.__members__)}."
                f"{suggest(str(self.task_type), TaskType.__members__)}"
            )
        if self.peft_version is None:
            self.peft_version = PEFT_VERSION

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "peft_type" and value in PeftType.__members__:
            value = PeftType[value]
        super().__setattr__(name, value)

    @property
    def unknown(self) -> dict[str, Any]:
        """Fields of the file that it was read from which this version does not know; saved again with it."""
        return self.__dict__.setdefault("_unknown", {})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `adapter_config.json` holds them."""
        known = {
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name not in self.at_runtime
        }
        return {**known, **self.unknown}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PeftConfig:
        """The config that `values` describe, of the class that their `peft_type` names, or this one.

        Fields that this version does not know have no effect: a warning names them, and they are kept for
        `to_dict`.

        Raises:
            ConfigError: no such method, or a field that asks for what is not supported; names it.
        """
        name = values.get("peft_type")
        # A file's own type decides, whichever class is asked: what it holds is an adapter of that method.
        chosen = cls if name is None else config_class(name)
        known = {f.name for f in dataclasses.fields(chosen) if f.init} - chosen.at_runtime
        kept, unknown = {}, {}
        for key, value in values.items():
            if key in known:
                kept[key] = value
            elif key not in chosen.at_runtime:
                unknown[key] = value
        if unknown:
            warnings.warn(
                f"{chosen.__name__}: unknown fields {', '.join(sorted(unknown))} have no effect here; they are "
                "kept when it is saved. A newer version may have written them.",
                stacklevel=2,
            )
        chosen.check_age(values)
        config = chosen(**kept)
        config.unknown.update(unknown)
        return config

    @classmethod
    def check_age(cls, values: Mapping[str, Any]) -> None:
        """Refuses what a version wrote whose tensors mean something else, or warns of it."""
        return None

    @classmethod
    def from_peft_type(cls, **values: Any) -> PeftConfig:
        """The config of the class that `peft_type` names, or of this one where it is not given."""
        return cls.from_dict(values)

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """The fields that a file holds, but for those of one run.

        Raises:
            ConfigError: it is absent, or is not JSON.
        """
        path = Path(path_json_file)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; a directory with an adapter has one.") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: is not JSON ({error}).") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: has no peft_type, so it is no adapter's config.")
        for name in cls.at_runtime & values.keys():
            warnings.warn(f"{path}: {name} is left out: it is said where a program runs.", stacklevel=2)
            del values[name]
        return values

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Reads `adapter_config.json` from a directory or from the hub.

        Args:
            subfolder: where in it.
            kwargs: arguments of `huggingface_hub.hf_hub_download`, such as `revision`, `token`, `cache_dir`.

        Raises:
            ConfigError: it is absent, is not JSON, or breaks a rule.
        """
        where = Path(pretrained_model_name_or_path)
        path = (where / subfolder if subfolder else where) / CONFIG_NAME
        if not path.is_file() and not where.exists():
            path = _from_hub(str(pretrained_model_name_or_path), subfolder, kwargs, path)
        values = cls.from_json_file(path)
        if not values.keys() >= MIN_EXPECTED_CONFIG_KEYS:
            raise TypelessError(f"{path}: has no peft_type, so it is no adapter's config.")
        return cls.from_dict(values)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes `adapter_config.json` into a directory, which is made where it is absent.

        Args:
            kwargs: `auto_mapping_dict`, to be written as `auto_mapping`.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ConfigError(f"save_pretrained: {folder} is a file. Name a directory.")
        folder.mkdir(parents=True, exist_ok=True)
        values = self.to_dict()
        mapping = kwargs.pop("auto_mapping_dict", None)
        if kwargs:
            raise TypeError(f"save_pretrained: unknown arguments: {', '.join(sorted(kwargs))}.")
        if mapping is not None:
            values["auto_mapping"] = mapping
        aside = folder / f".{CONFIG_NAME}.part"
        aside.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        aside.replace(folder / CONFIG_NAME)

    def push_to_hub(self, repo_id: str, *, commit_message: str | None = None, **kwargs: Any) -> Any:
        """Uploads `adapter_config.json` to a repository of the Hugging Face hub, which is made where it is absent.

        Args:
            kwargs: `private`, `token`, `revision`, `create_pr`, `commit_description`, as in `PeftModel.push_to_hub`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return folders.upload_to_hub(Path(folder), repo_id, commit_message or "Upload config", **kwargs)


def name_set(value: Any) -> Any:
    """Names of layers as a set; what is no list of them as it is."""
    return set(value) if isinstance(value, (list, tuple, frozenset)) else value


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The config that a dictionary describes, of the class that its `peft_type` names.

    Raises:
        ConfigError: it names none, or one that is no method.
    """
    if config_dict.get("peft_type") is None:
        raise ConfigError("get_peft_config: peft_type is missing; it names the method, such as 'LORA'.")
    return PeftConfig.from_dict(config_dict)


# HF PEFT's name of the same base.
PeftConfigMixin = PeftConfig


class TargetedConfig(PeftConfig):
    """A config of a method that sits on layers. No dataclass itself: HF PEFT's methods each have these fields
    in an order of their own, so each declares those that it has.

    Args:
        target_modules: names or suffixes of layers, one regular expression over whole names, `"all-linear"`,
            or None for the architecture's usual ones. Names become a set.
        exclude_modules: names or suffixes, or one regular expression, of layers to leave out. Names become a set.
        modules_to_save: names of modules that are trained whole beside the adapter.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules = name_set(self.target_modules)
        self.exclude_modules = name_set(self.exclude_modules)
        saved = self.modules_to_save
        if isinstance(saved, (list, tuple, set, frozenset)):
            self.modules_to_save = list(
                dict.fromkeys(sorted(saved) if isinstance(saved, (set, frozenset)) else saved)
            )

    def check_layers(self, *, of_str: bool = True, alone: bool = True) -> None:
        """Refuses `layers_to_transform` and `layers_pattern` where they contradict.

        Args:
            of_str: beside targets that are one regular expression. alone: a pattern without indices.
        """
        where, given = (
            type(self).__name__,
            {n: getattr(self, n) for n in ("layers_to_transform", "layers_pattern")},
        )
        for name, value in given.items() if of_str and isinstance(self.target_modules, str) else ():
            if value is not None:
                raise ConfigError(f"{where}.{name}: cannot be used when `target_modules` is a str.")
        if alone and given["layers_pattern"] and given["layers_to_transform"] is None:
            raise ConfigError(f"{where}.layers_pattern: `layers_to_transform` must be given with it.")


@dataclass
class PromptLearningConfig(PeftConfig):
    """A config of a method that adds tokens before the input.

    Args:
        num_virtual_tokens: how many, at least 1.
        token_dim, num_transformer_submodules, num_attention_heads, num_layers: the base's sizes, filled in
            when the adapter is added.
        modules_to_save: names of modules that are trained whole beside the adapter.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = field(default=None)

    is_prompt_learning: ClassVar[bool] = True
    # Fields that must be what the base has.
    of_the_base: ClassVar[frozenset[str]] = frozenset({"token_dim"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rule, allowed in (
            ("num_virtual_tokens", "a whole number of at least 1", lambda value: value >= 1),
            ("num_transformer_submodules", "1, or 2 with a decoder's tokens", lambda value: value in (1, 2)),
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not allowed(value)):
                raise ConfigError(f"{type(self).__name__}.{name}: {value!r}; it is {rule}.")

    @property
    def num_tokens(self) -> int:
        """How many positions it adds to a row."""
        if self.num_virtual_tokens is None:
            raise ConfigError(
                f"{type(self).__name__}.num_virtual_tokens: None; it is a whole number of at least 1."
            )
        return self.num_virtual_tokens

    @property
    def total_tokens(self) -> int:
        """How many tokens it has in all, those of a decoder counted."""
        return self.num_tokens * (self.num_transformer_submodules or 1)

    def fit(self, sizes: BaseSizes) -> None:
        """Takes the base's sizes into the fields that are not given.

        Raises:
            ConfigError: a field that is given is not what the base has.
        """
        self.num_tokens  # noqa: B018  (raises where it is not known)
        stacks = self.num_transformer_submodules or (2 if self.task_type == "SEQ_2_SEQ_LM" else 1)
        if stacks > sizes.num_stacks:
            raise ConfigError(
                f"{type(self).__name__}.num_transformer_submodules: {stacks}, which task_type "
                f"{self.task_type} means too, but the base has one stack. Set it to 1, or take an "
                "encoder-decoder base."
            )
        known = self.sizes_of(sizes)
        for name, value in known.items():
            given = getattr(self, name)
            if name in self.of_the_base and given not in (None, value):
                raise ConfigError(
                    f"{type(self).__name__}.{name}: {given!r}, but the base has {value}. Leave it out."
                )
        self.num_transformer_submodules = stacks
        for name, value in known.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if getattr(self, "encoder_hidden_size", 0) is None:
            self.encoder_hidden_size = self.token_dim

    def sizes_of(self, sizes: BaseSizes) -> dict[str, int]:
        """The fields that follow from the base."""
        return {
            "token_dim": sizes.width,
            "num_layers": sizes.num_layers,
            "num_attention_heads": sizes.num_heads,
        }


def _from_hub(name: str, subfolder: str | None, how: dict[str, Any], path: Path) -> Path:
    if len(parts := name.split("/")) > 2 or not all(part and part not in (".", "..", "~") for part in parts):
        return path
    try:
        return Path(huggingface_hub.hf_hub_download(name, CONFIG_NAME, subfolder=subfolder, **how))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"{path}: no such file, and {name!r} cannot be read from the hub: {first}"
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
