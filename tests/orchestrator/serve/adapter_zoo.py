"""Adapters of every method that generates, with weights of their own, for engines to serve side by side."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import peft_dist
from tests.contract import bases
from tests.contract import methods as contract_methods
from tests.contract.cases import disturb

# Methods that read something of a batch which no request of an endpoint has.
NEED_MORE = ("poly", "multitask")


@dataclass(frozen=True)
class Kept:
    """An adapter on disk, a prompt, and what its own model answers alone."""

    label: str
    folder: Path
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def base(kind: str = "llama") -> Any:
    """A small base without an end of answers."""
    model = getattr(bases, kind)().float().eval()
    model.generation_config.eos_token_id = None
    return model


def parities(kind: str) -> dict[str, Any]:
    """Every config of the contract's tests on this base, by its label; one of each where `projection_prng_key`
    would let only one kind be on a model."""
    found = {}
    for module in pkgutil.iter_modules(contract_methods.__path__):
        table = getattr(importlib.import_module(f"{contract_methods.__name__}.{module.name}"), "PARITY", {})
        for label, parity in table.items():
            if parity.base == kind and parity.values.get("projection_prng_key", 0) == 0:
                found[label] = parity
    return {label: p for label, p in found.items() if not label.startswith(NEED_MORE)}


def adapted(kind: str, parity: Any, seed: int) -> Any:
    """A model with this adapter and weights that are not its start."""
    torch.manual_seed(seed)
    task = parity.values.get("task_type") or "CAUSAL_LM"
    config = getattr(peft_dist, parity.config)(**{**parity.values, "task_type": task})
    model = peft_dist.get_peft_model(base(kind), config)
    disturb(model, seed=seed)
    return model.eval()


def prompt_of(seed: int) -> tuple[int, ...]:
    """A few tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, 64, (5 + seed % 9,), generator=generator).tolist())


def answer(model: Any, prompt: tuple[int, ...], num: int) -> tuple[int, ...]:
    """Greedy tokens of transformers' generate."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(out[0, len(prompt) :].tolist())


def kept(folder: Path, kind: str, num: int, wanted: Callable[[str], bool] = lambda label: True) -> list[Kept]:
    """One adapter of each config, saved, with the answer of a model that was loaded from its folder."""
    made = []
    for seed, (label, parity) in enumerate(parities(kind).items()):
        if not wanted(label):
            continue
        place, prompt = folder / f"{kind}-{seed}", prompt_of(seed)
        adapted(kind, parity, seed).save_pretrained(place)
        alone = peft_dist.PeftModel.from_pretrained(base(kind), place).eval()
        made.append(Kept(label, place, prompt, answer(alone, prompt, num)))
    return made
