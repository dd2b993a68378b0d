"""Adapters and bases for tests that train none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from orchestrator.identity import BaseIdentity
from orchestrator.lineage import Lineage

BASE = BaseIdentity("tiny", None, "b" * 64, "/models/tiny")


def make_adapter(folder: Path, value: float = 1.0, **config: object) -> Path:
    """A LoRA adapter with one site, in HF PEFT's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "/models/tiny", "r": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    site = "base_model.model.layers.0.q_proj"
    tensors = {
        f"{site}.lora_A.weight": np.full((2, 4), value, np.float32),
        f"{site}.lora_B.weight": np.zeros((4, 2), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def make_base(folder: Path, seed: int = 0, **config: object) -> Path:
    """A folder with what a base's identity is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_type": "llama", "hidden_size": 4, "_name_or_path": str(folder), **config}
    (folder / "config.json").write_text(json.dumps(settings))
    weights = np.random.default_rng(seed).standard_normal((8, 4)).astype(np.float32)
    save_file({"embed.weight": weights}, folder / "model.safetensors")
    return folder


def lineage(**facts: object) -> Lineage:
    """A lineage on `BASE`."""
    return Lineage(**{"base": BASE, **facts})  # type: ignore[arg-type]
