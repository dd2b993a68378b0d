"""An adapter's folder in HF PEFT's layout: what makes one fit to be registered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ModelError
from .weights_table import read_table

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_BLOCK = 1 << 22
"""Numbers checked at a time, so that a large adapter costs little memory."""


@dataclass(frozen=True)
class AdapterFolder:
    """A checked folder. `files` maps each relative path to its sha256 and size in bytes."""

    path: Path
    config: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def base_model(self) -> str | None:
        """The base that the config names."""
        return self.config.get("base_model_name_or_path")


def check_adapter(folder: Path) -> AdapterFolder:
    """Reads and checks `folder`.

    Raises:
        ModelError: no folder, no or damaged config, pickled, missing, truncated or non-finite weights.
    """
    config = _config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise _no_weights(folder)
    for name, dtype, offset, num_bytes in _tensors(weights):
        if not _is_finite(weights, dtype, offset, num_bytes):
            raise ModelError(
                f"the tensor {name} of {weights} has NaN or infinite values.",
                hint="Train it again: it diverged.",
            )
    return AdapterFolder(folder, config, _hashes(folder))


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(f"'{folder}' is not a folder.", hint="Name an adapter's folder.")
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(
            f"'{folder}' has no {CONFIG}, so it is not an adapter's folder.",
            hint="Name a folder that save_pretrained of a PEFT model wrote.",
        )
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}.", hint="Save the adapter again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ModelError(
            f"{path} names no peft_type, so nothing can load it.",
            hint="Name a folder that save_pretrained of a PEFT model wrote.",
        )
    return config


def _no_weights(folder: Path) -> ModelError:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        return ModelError(
            f"'{folder}' has only pickled weights ({pickled[0]}): reading runs code.",
            hint="Save it as safetensors: model.save_pretrained(DIR, safe_serialization=True).",
        )
    return ModelError(f"'{folder}' has no {WEIGHTS}.", hint="Save the adapter again.")


def _tensors(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """(name, dtype, offset in the file, bytes) of each tensor of a file that is whole."""
    with open(path, "rb") as file:

        def read(start: int, end: int) -> bytes:
            file.seek(start)
            return file.read(end - start)

        table, begins = read_table(read, path.stat().st_size, str(path))
    if not table:
        raise ModelError(f"{path} has no tensors.", hint="Save the adapter again.")
    for name, tensor in table.items():
        first, last = tensor["data_offsets"]
        yield name, tensor["dtype"], begins + first, last - first


def _is_finite(path: Path, dtype: str, offset: int, num_bytes: int) -> bool:
    if dtype == "BF16":
        kind: Any = np.uint16  # numpy has no bfloat16: its exponent is all ones where it is not finite
    elif dtype in _FLOATS:
        kind = _FLOATS[dtype]
    else:
        return True
    count = num_bytes // np.dtype(kind).itemsize
    with open(path, "rb") as file:
        file.seek(offset)
        for first in range(0, count, _BLOCK):
            block = np.fromfile(file, dtype=kind, count=min(_BLOCK, count - first))
            finite = (block & 0x7F80) != 0x7F80 if dtype == "BF16" else np.isfinite(block)
            if not finite.all():
                return False
    return True


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    files = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        files[file.relative_to(folder).as_posix()] = {"sha256": digest, "size_bytes": file.stat().st_size}
    return files
