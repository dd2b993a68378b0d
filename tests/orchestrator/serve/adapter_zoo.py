"""Adapters of every method that generates, with weights of their own, for engines to serve side by side."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

import peft_dist
from tests.contract import bases
from tests.contract import methods as contract_methods
from tests.contract.case import Parity
from tests.contract.cases import disturb


@dataclass(frozen=True)
class Kept:
    """An adapter on disk, a prompt, its task where it learned several, and what its own model answers alone."""

    label: str
    folder: Path
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    task: int | None = None
    config: Any = None


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
    return found | (MORE if kind == "llama" else {})


def _loftq(bits: int, times: int) -> dict[str, Any]:
    return {
        "r": 4,
        "init_lora_weights": "loftq",
        "loftq_config": {"loftq_bits": bits, "loftq_iter": times},
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    }


_MIXTURE = {"hidden_size": 16, "xlora_depth": 2, "xlora_size": 8}
MORE: dict[str, Any] = {
    "bone": Parity("llama", "BoneConfig", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "loftq": Parity("llama", "LoraConfig", _loftq(4, 1)),
    "loftq of the same": Parity("llama", "LoraConfig", _loftq(4, 1)),
    "loftq of 8 bits, twice": Parity("llama", "LoraConfig", _loftq(8, 2)),
    "loftq with dora": Parity("llama", "LoraConfig", {**_loftq(4, 1), "use_dora": True}),
    "xlora": Parity("llama", "XLoraConfig", {**_MIXTURE, "scaling_pass_value": 0.4}),
    "xlora of layers": Parity(
        "llama", "XLoraConfig", {**_MIXTURE, "layerwise_scalings": True, "top_k_lora": 2}
    ),
}
"""Starts and methods of which HF PEFT has no equal that the contract's tests could hold them to."""


def _experts(folder: Path) -> dict[str, str]:
    """Three LoRA adapters for a mixture."""
    for number in range(3):
        torch.manual_seed(100 + number)
        config = peft_dist.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        peft_dist.get_peft_model(base(), config).save_pretrained(folder / str(number))
    return {str(number): str(folder / str(number)) for number in range(3)}


def adapted(kind: str, parity: Any, seed: int, folder: Path) -> Any:
    """A model with this adapter and weights that are not its start. A mixture's adapters are put into `folder`."""
    torch.manual_seed(seed)
    task = parity.values.get("task_type") or "CAUSAL_LM"
    values = {**parity.values, "task_type": task}
    if parity.config == "XLoraConfig":
        values["adapters"] = _experts(folder)
    config = getattr(peft_dist, parity.config)(**values)
    model = peft_dist.get_peft_model(uncached(kind), config)
    move(model, seed)
    return model.eval()


def move(model: Any, seed: int, size: float = 0.3) -> None:
    """Moves all that is trained away from its start, virtual tokens too."""
    disturb(model, seed=seed, size=size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in model.adapters:
            for tensor in model.tensors(adapter).values():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * size)


def uncached(kind: str) -> Any:
    """The base as a mixture asks for it."""
    model = base(kind)
    model.config.use_cache = False
    return model


def prompt_of(seed: int) -> tuple[int, ...]:
    """A few tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, 64, (5 + seed % 9,), generator=generator).tolist())


def answer(model: Any, prompt: tuple[int, ...], num: int, task: int | None = None) -> tuple[int, ...]:
    """Greedy tokens of transformers' generate."""
    ids = torch.tensor([prompt])
    more = {} if task is None else {"task_ids": torch.tensor([task])}
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **more,
    )
    return tuple(out[0, len(prompt) :].tolist())


def is_theirs(kept: Kept) -> bool:
    """Whether HF PEFT can run it here: it has no Bone any more, and its LoftQ quantises on a GPU alone."""
    is_loftq = getattr(kept.config, "init_lora_weights", None) == "loftq"
    return not is_loftq and str(kept.config.peft_type) in peft.PeftType.__members__


def answer_of_peft(kind: str, kept: Kept, num: int) -> tuple[int, ...]:
    """What HF PEFT's model of the same folder answers."""
    model = peft.PeftModel.from_pretrained(uncached(kind), kept.folder).eval()
    return answer(model, kept.prompt, num, kept.task)


def kept(folder: Path, kind: str, num: int, wanted: Callable[[str], bool] = lambda label: True) -> list[Kept]:
    """One adapter of each config, saved, with the answer of a model that was loaded from its folder."""
    made = []
    for seed, (label, parity) in enumerate(parities(kind).items()):
        if not wanted(label):
            continue
        place, prompt = folder / f"{kind}-{seed}", prompt_of(seed)
        model = adapted(kind, parity, seed, folder / f"experts-{seed}")
        model.save_pretrained(place)
        alone = peft_dist.PeftModel.from_pretrained(uncached(kind), place).eval()
        config = alone.peft_config["default"]
        task = 1 + seed % 2 if "task_ids" in config.reads else None
        made.append(Kept(label, place, prompt, answer(alone, prompt, num, task), task, config))
    return made
