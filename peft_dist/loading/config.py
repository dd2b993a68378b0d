"""Configs of bases: read, given labels, and what is said where a base cannot be opened by its config."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import transformers

from peft_dist.errors import BaseModelError

_FAILURES = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, safetensors.SafetensorError)


def read_config(
    path: str, source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The config of a base, every default of its architecture filled in.

    Args:
        path: as it was named. source: a directory or a hub id.

    Raises:
        BaseModelError: there is none, or its architecture is unknown here.
    """
    with explaining(path, source):
        return transformers.AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )


def set_labels(config: Any, labels: Sequence[str]) -> None:
    """Gives a config the classes that a head tells apart, by name."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}


@contextlib.contextmanager
def explaining(path: str, source: str) -> Iterator[None]:
    """Within it, what transformers raises of a base becomes a BaseModelError in one line."""
    try:
        yield
    except _FAILURES as error:
        raise BaseModelError(f"base model: {path!r} {_why(source, error)}") from error


def _why(source: str, error: Exception) -> str:
    if isinstance(error, ValueError | KeyError) and Path(source).is_dir():
        model_type = json.loads((Path(source) / "config.json").read_text()).get("model_type")
        if model_type not in transformers.CONFIG_MAPPING:
            return (
                f"is of model_type {model_type!r}, which transformers {transformers.__version__} does not know. If the "
                "model brings its own code and you trust it, set trust_remote_code."
            )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"cannot be loaded: {lines[0] if lines else type(error).__name__}"
