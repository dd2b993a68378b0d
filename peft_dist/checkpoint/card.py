"""The card of an adapter's directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

from peft_dist.checkpoint.layout import CARD_NAME
from peft_dist.config import PeftConfig


def card_of(config: PeftConfig, base: Any = None, before: str | None = None, tags: Sequence[str] = ()) -> str:
    """Its text: that of `before` where there is one, under the facts by which hubs find an adapter and its base.

    Args:
        base: that the adapter stands on; its own tags are kept. tags: more of them.
    """
    given = _text_of(config) if before is None else before
    headed = given if given.startswith("---") else f"---\n{{}}\n---\n{given}"
    card: Any = huggingface_hub.ModelCard(headed, ignore_metadata_errors=True)
    card.data.library_name = "peft"
    if config.base_model_name_or_path:
        card.data.base_model = config.base_model_name_or_path
    if config.task_type == "CAUSAL_LM" and not card.data.pipeline_tag:
        card.data.pipeline_tag = "text-generation"
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *_tags(config, base), *tags]))
    return str(card)


def _tags(config: PeftConfig, base: Any) -> list[str]:
    name = config.base_model_name_or_path
    is_transformers = any(kind.__module__.startswith("transformers.") for kind in type(base).__mro__)
    return [
        *(getattr(base, "model_tags", None) or ()),
        *([f"base_model:adapter:{name}"] if name else []),
        _method(config).lower(),
        *(["transformers"] if is_transformers else []),
    ]


def _text_of(config: PeftConfig) -> str:
    task = f" for {config.task_type}" if config.task_type else ""
    body = [
        f"# {_method(config)} adapter",
        "",
        f"Trained{task} on the base `{config.base_model_name_or_path or 'given by its user'}`.",
        "Load it with this library or with HF PEFT:",
        "",
        "```python",
        "model = PeftModel.from_pretrained(base_model, THIS_DIRECTORY)",
        "```",
        "",
    ]
    return "\n".join(["", *body])


def _method(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def write_card(folder: Path, config: PeftConfig, base: Any = None, tags: Sequence[str] = ()) -> None:
    """Writes the card of an adapter's directory, with more tags. Text that is there stays, under its facts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CARD_NAME
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    path.write_text(card_of(config, base, before, tags), encoding="utf-8")
