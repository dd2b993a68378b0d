"""What every method's config has: HF PEFT's common fields, and the way to and from `adapter_config.json`.

A config is the method: its fields are the public ones, its functions are in `contract`. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft_dist.catalog import TaskType, config_class
from peft_dist.errors import ConfigError, suggest

CONFIG_NAME = "adapter_config.json"


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

    # Fields of HF PEFT that nothing here reads yet, with the one value under which that is right.
    without_effect: ClassVar[Mapping[str, Any]] = {}
    is_prompt_learning: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in TaskType.__members__:
            raise ConfigError(
                f"task_type: {self.task_type!r} is not one of {', '.join(TaskType.__members__)}."
                f"{suggest(str(self.task_type), TaskType.__members__)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `adapter_config.json` holds them."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PeftConfig:
        """The config that `values` describe, of the class that their `peft_type` names, or this one.

        Fields that no version of the method knows are left out with a warning, since newer versions add some.

        Raises:
            ConfigError: no such method, or a field that asks for what is not supported; names it.
        """
        name = values.get("peft_type")
        chosen = cls if name is None or cls is not PeftConfig else config_class(name)
        known = {f.name for f in dataclasses.fields(chosen)}
        kept, unknown = {}, []
        for key, value in values.items():
            if key in known:
                kept[key] = value
            elif key in chosen.without_effect:
                if value != chosen.without_effect[key] and value is not None:
                    raise ConfigError(
                        f"{chosen.__name__}.{key}: {value!r} is not supported; only "
                        f"{chosen.without_effect[key]!r} is. Train or convert the adapter without it."
                    )
            else:
                unknown.append(key)
        if unknown:
            warnings.warn(
                f"{chosen.__name__}: unknown fields are left out: {', '.join(sorted(unknown))}.", stacklevel=2
            )
        return chosen(**kept)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> PeftConfig:
        """Reads `adapter_config.json` from a directory.

        Raises:
            ConfigError: it is absent, is not JSON, or breaks a rule.
        """
        path = Path(directory) / CONFIG_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; a directory with an adapter has one.") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: is not JSON ({error}).") from None
        if not isinstance(values, dict) or "peft_type" not in values:
            raise ConfigError(f"{path}: has no peft_type, so it is no adapter's config.")
        return cls.from_dict(values)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `adapter_config.json` into a directory, which is made where it is absent."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{CONFIG_NAME}.part"
        aside.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        aside.replace(folder / CONFIG_NAME)


class TargetedConfig(PeftConfig):
    """A config of a method that sits on layers. No dataclass itself: HF PEFT's methods each have these fields
    in an order of their own, so each declares those that it has.

    Args:
        target_modules: names or suffixes of layers, one regular expression over whole names, `"all-linear"`,
            or None for the architecture's usual ones.
        exclude_modules: names or suffixes, or one regular expression, of layers to leave out.
        modules_to_save: names of modules that are trained whole beside the adapter.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set, frozenset)):
                setattr(
                    self,
                    name,
                    list(dict.fromkeys(sorted(value) if isinstance(value, (set, frozenset)) else value)),
                )


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


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
