"""A base's files: found, fetched where they are elsewhere, and looked at before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from peft_dist.errors import BaseModelError
from peft_dist.folder import FolderError, check_safetensors, is_hub_id, local_folder

_BESIDE = ("*.json", "*.py", "*.model", "*.txt", "*.jinja")
# Pickled weights of a directory or URL are looked for only to say that they are there.
_FILES = (*_BESIDE, "*.safetensors", "*.bin")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def fetched(path: str, revision: str | None = None) -> Path:
    """A local directory with a base's config and whole safetensors; headers alone are read.

    Of a repository on the hub, the weight files that its index names are fetched, and no others.

    Raises:
        BaseModelError: it is nowhere, is no model's directory, or its files are missing or cut short.
    """
    try:
        if is_hub_id(path):
            folder = local_folder(path, _BESIDE, revision=revision)
            names = _named(folder / INDEX) if (folder / INDEX).is_file() else [SINGLE]
            folder = local_folder(path, (*_BESIDE, *names), revision=revision)
        else:
            folder = local_folder(path, _FILES)
        _check_config(path, folder)
        for file in weight_files(path, folder):
            check_safetensors(file)
    except FolderError as error:
        where = f"{path!r} cannot be loaded: " if is_hub_id(path) else ""
        raise BaseModelError(f"base model: {where}{error}") from error
    return folder


def _check_config(path: str, folder: Path) -> None:
    file = folder / "config.json"
    if not file.is_file():
        raise BaseModelError(f"base model: {path!r} has no config.json; it is not a model's directory.")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise BaseModelError(f"base model: {file} is not JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise BaseModelError(f"base model: {file} names no model_type; it is not a model's config.")


def weight_files(path: str, folder: Path) -> list[Path]:
    """The safetensors files that hold a base's weights.

    Raises:
        BaseModelError: there are none, or one that the index names is missing.
    """
    if (folder / INDEX).is_file():
        names = _named(folder / INDEX)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise BaseModelError(
                f"base model: {path!r} lacks {len(missing)} of {len(names)} weight files: "
                f"{', '.join(missing[:3])}. "
                f"Copy them beside {INDEX}."
            )
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    if pickled:
        raise BaseModelError(
            f"base model: {path!r} has its weights in {pickled[0]}, which runs code when it is read; only "
            "safetensors are loaded. Convert it where you trust it: "
            "AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR)."
        )
    raise BaseModelError(f"base model: {path!r} has no model.safetensors.")


def _named(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(f"base model: {index} is not an index of shards. Copy it again.") from error
