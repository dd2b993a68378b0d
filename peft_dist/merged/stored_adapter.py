"""A saved adapter of which one layer's tensors are read at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from peft_dist.checkpoint.layout import PICKLED_NAME, WEIGHTS_NAME
from peft_dist.config import CONFIG_NAME, PeftConfig
from peft_dist.errors import CheckpointError
from peft_dist.folder import FolderError, check_safetensors
from peft_dist.loading.pending import Pending
from peft_dist.loading.stored import File


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        try:
            check_safetensors(path)
        except (FolderError, OSError) as error:
            raise CheckpointError(f"adapter: {error}") from error
        self._file = File(path)

    def __getitem__(self, key: str) -> Tensor:
        return self._file.tensors[key].whole()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.tensors)

    def __len__(self) -> int:
        return len(self._file.tensors)

    def __contains__(self, key: object) -> bool:
        return key in self._file.tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's sizes; it is not read."""
        return tuple(self._file.tensors[key].shape)

    def pending(self, key: str) -> Pending:
        """A tensor, not read yet."""
        return self._file.tensors[key]

    def below(self, layer: str) -> dict[str, Tensor]:
        """The tensors whose names begin with a layer's, read."""
        start = f"{layer}." if layer else ""
        return {key: self[key] for key in self if key.startswith(start)}

    def of(self, layer: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of a layer that have these names there, read."""
        keys = {f"{layer}.{name}" if layer else name for name in names}
        return {key: self[key] for key in self if key in keys}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def open_adapter(folder: str | os.PathLike[str]) -> tuple[PeftConfig, StoredTensors]:
    """The config of an adapter in a directory, and its tensors, unread.

    Raises:
        CheckpointError: it is none, is damaged, or its weights are pickled. ConfigError: its config breaks a rule.
    """
    here = Path(folder)
    if not (here / CONFIG_NAME).is_file():
        raise CheckpointError(f"{str(folder)!r} has no {CONFIG_NAME}; it is not an adapter's directory.")
    config = PeftConfig.from_pretrained(here)
    if not (here / WEIGHTS_NAME).is_file():
        pickled = (
            f", only {PICKLED_NAME}, which runs code when it is read"
            if (here / PICKLED_NAME).is_file()
            else ""
        )
        raise CheckpointError(f"{str(folder)!r} has no {WEIGHTS_NAME}{pickled}.")
    config.__dict__["home"] = os.fspath(folder)
    return config, StoredTensors(here / WEIGHTS_NAME)
