"""Adapters written to disk or to a URL: aside, renamed, the config last."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import fsspec
import safetensors
import safetensors.torch
from torch import Tensor

from peft_dist.aside import aside
from peft_dist.checkpoint.card import card_of
from peft_dist.checkpoint.layout import CARD_NAME, DEFAULT_ADAPTER, PICKLED_NAME, WEIGHTS_NAME
from peft_dist.checkpoint.names import defines, known_adapter
from peft_dist.checkpoint.state import state_dict, values
from peft_dist.config import CONFIG_NAME, PeftConfig
from peft_dist.errors import CheckpointError
from peft_dist.folder import is_url
from peft_dist.ranks import is_writer


def save(
    model: Any,
    directory: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    *,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    is_main_process: bool | None = None,
    whole_model: Mapping[str, Tensor] | None = None,
    convert: Callable[[PeftConfig, dict[str, Tensor]], tuple[PeftConfig, dict[str, Tensor]]] | None = None,
) -> None:
    """Writes adapters to a directory or fsspec URL, from which HF PEFT and `read` load them.

    The adapter named "default" goes into the directory itself, each other one into a subdirectory of its
    name. To be called on every rank, since sharded tensors are gathered; one rank writes. Files are written
    aside and renamed, the config last: whoever finds one finds the whole adapter.

    Args:
        is_main_process: whether this process writes; by default rank 0 of the default group does.
        convert: makes of a config and its tensors what is written in their place.

    Raises:
        AdapterError: an adapter that is not there.
        CheckpointError: values are not known here, or the directory cannot be written.
    """
    names = list(model.peft_config if names is None else names)
    for name in names:
        known_adapter(model, name)
    writes = is_writer(is_main_process)
    for name in names:
        tensors = state_dict(model, name, whole_model, save_embedding_layers)
        parts = _parts(model, name)
        if writes:
            target = os.fspath(directory) if name == DEFAULT_ADAPTER else f"{os.fspath(directory)}/{name}"
            config = copy.copy(model.peft_config[name])
            if convert is not None:
                config, tensors = convert(config, tensors)
            if parts:
                config = copy.copy(config.saved_at(target))
            config.inference_mode = True
            _write(target, config, tensors, model.get_base_model())
            for part, (part_config, part_tensors) in parts.items():
                part_config.inference_mode = True
                _write(f"{target}/{part}", part_config, part_tensors, model.get_base_model())


def _parts(model: Any, adapter_name: str) -> dict[str, tuple[Any, dict[str, Tensor]]]:
    """The adapters that are saved beside it, their tensors whole."""
    config = model.peft_config[adapter_name]
    if not defines(config, "parts"):
        return {}
    parts = config.parts(model.base_model.sites(adapter_name))
    return {
        part: (part_config, {key: values(key, tensor) for key, tensor in tensors.items()})
        for part, (part_config, tensors) in parts.items()
    }


def _write(target: str, config: PeftConfig, tensors: Mapping[str, Tensor], base: Any) -> None:
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        with aside(None if is_url(target) else Path(target), ".adapter-") as folder:
            safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
            (folder / CARD_NAME).write_text(card_of(config, base, _card_at(target)), encoding="utf-8")
            config.save_pretrained(folder)
            if is_url(target):
                _upload(folder, target)
            else:
                _move(folder, Path(target))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{target}: the adapter cannot be written: {error}") from error


def _card_at(target: str) -> str | None:
    """The text of the card that a directory has."""
    path = Path(target) / CARD_NAME
    return path.read_text(encoding="utf-8") if not is_url(target) and path.is_file() else None


def _move(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    for name in (WEIGHTS_NAME, CARD_NAME, CONFIG_NAME):
        os.replace(folder / name, target / name)
    # A pickled adapter of before would be another one.
    (target / PICKLED_NAME).unlink(missing_ok=True)


def _upload(folder: Path, target: str) -> None:
    filesystem, root = fsspec.url_to_fs(target)
    filesystem.makedirs(root, exist_ok=True)
    for name in (WEIGHTS_NAME, CARD_NAME, CONFIG_NAME):
        filesystem.put_file(str(folder / name), f"{root}/{name}")
