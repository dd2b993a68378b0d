"""The card of an adapter's directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from peft_dist.checkpoint.layout import CARD_NAME
from peft_dist.config import PeftConfig


def card_of(config: PeftConfig) -> str:
    """Its text for a new adapter."""
    base = config.base_model_name_or_path or ""
    head = ["---", *([f"base_model: {json.dumps(base)}"] if base else []), "library_name: peft"]
    method = str(getattr(config.peft_type, "value", config.peft_type))
    tags = ["tags:", f"- {method.lower()}", "---"]
    task = f" for {config.task_type}" if config.task_type else ""
    body = [
        "",
        f"# {method} adapter",
        "",
        f"Trained{task} on the base `{base or 'given by its user'}`.",
        "Load it with this library or with HF PEFT:",
        "",
        "```python",
        "model = PeftModel.from_pretrained(base_model, THIS_DIRECTORY)",
        "```",
        "",
    ]
    return "\n".join(head + tags + body)


def tag_card(folder: Path, config: PeftConfig, tags: Sequence[str]) -> None:
    """Adds tags to the card of an adapter's directory, which is written where it is absent."""
    if not (folder / CARD_NAME).is_file():
        write_card(folder, config)
    card = huggingface_hub.ModelCard.load(folder / CARD_NAME)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    card.save(folder / CARD_NAME)


def write_card(folder: Path, config: PeftConfig) -> None:
    """Writes the card of an adapter's directory. Text that is there stays, under the facts that hubs look for."""
    folder.mkdir(parents=True, exist_ok=True)
    path, card = folder / CARD_NAME, card_of(config)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        card = text if text.startswith("---") else card[: card.index("---", 3) + 4] + text
    path.write_text(card, encoding="utf-8")
