"""Adapters read from disk, URLs and hubs, without a model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from peft_dist.checkpoint.layout import BASE_PREFIX, PICKLED_NAME, WEIGHTS_NAME
from peft_dist.config import CONFIG_NAME, PeftConfig
from peft_dist.errors import CheckpointError
from peft_dist.folder import HUB_OPTIONS, FolderError, check_safetensors, is_hub_id, local_folder


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as read from its directory: its config, and its tensors on the CPU by their names in the
    file."""

    config: PeftConfig
    tensors: dict[str, Tensor]


def read_config(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: Any = None,
) -> PeftConfig:
    """The config of a saved adapter: a directory, an fsspec URL or a hub id.

    Raises:
        CheckpointError: it is not there. ConfigError: it breaks a rule.
    """
    return _read_config(_found(path, (CONFIG_NAME,), revision, subfolder, token), path)


def read(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: Any = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> SavedAdapter:
    """A saved adapter: a directory, an fsspec URL or a hub id.

    Args:
        subfolder: where in it; adapters that are not "default" lie in a folder of their name.
        key_mapping: regular expressions on names in the file, without `base_model.model.`, and what to put
        there.
        hub: some of `folder.HUB_OPTIONS`, such as `cache_dir` and `local_files_only`.

    Raises:
        TypeError: another argument.
        CheckpointError: it is not there, is damaged, or its weights are pickled.
        ConfigError: its config breaks a rule.
    """
    if unknown := hub.keys() - HUB_OPTIONS:
        raise TypeError(f"unknown arguments: {', '.join(sorted(unknown))}.")
    folder = _found(path, (CONFIG_NAME, WEIGHTS_NAME, PICKLED_NAME), revision, subfolder, token, **hub)
    config = _read_config(folder, path)
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        if (folder / PICKLED_NAME).is_file():
            raise CheckpointError(
                f"{os.fspath(path)!r} has its weights in {PICKLED_NAME}, which runs code when it is read; "
                f"only {WEIGHTS_NAME} is loaded. Convert it where you trust it: safetensors.torch.save_file("
                f"torch.load({PICKLED_NAME!r}, weights_only=True), {WEIGHTS_NAME!r})."
            )
        raise CheckpointError(f"{os.fspath(path)!r} has no {WEIGHTS_NAME}.")
    try:
        check_safetensors(file)
        tensors = safetensors.torch.load_file(file, device="cpu")
    except (FolderError, OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"adapter {os.fspath(path)!r}: {error}") from error
    # Where a method may look for the parts that it was saved with.
    config.__dict__["home"] = os.fspath(path)
    return SavedAdapter(config, _renamed(tensors, key_mapping))


def _found(
    path: str | os.PathLike[str],
    names: tuple[str, ...],
    revision: str | None,
    subfolder: str | None,
    token: Any,
    **hub: Any,
) -> Path:
    text = os.fspath(path)
    on_hub = is_hub_id(text)
    if subfolder and not on_hub:
        text = f"{text.rstrip('/')}/{subfolder}"
    patterns = tuple(f"{subfolder}/{name}" for name in names) if subfolder and on_hub else names
    try:
        folder = local_folder(text, patterns, revision=revision, token=token, **hub)
    except FolderError as error:
        raise CheckpointError(f"adapter: {error}") from error
    return folder / subfolder if subfolder and on_hub else folder


def _read_config(folder: Path, path: str | os.PathLike[str]) -> PeftConfig:
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{os.fspath(path)!r} has no {CONFIG_NAME}; it is not an adapter's directory.")
    return PeftConfig.from_pretrained(folder)


def _renamed(tensors: dict[str, Tensor], mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    if not mapping:
        return tensors
    renamed = {}
    for key, value in tensors.items():
        name = renamed_by(mapping, key.removeprefix(BASE_PREFIX))
        renamed[BASE_PREFIX + name if key.startswith(BASE_PREFIX) else name] = value
    return renamed


def renamed_by(mapping: Mapping[str, str], name: str) -> str:
    """A name after the first of these regular expressions that is in it, without `base_model.model.`."""
    for pattern, replacement in mapping.items():
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name
