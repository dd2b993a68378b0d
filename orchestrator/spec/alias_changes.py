"""Other projects' values as ours: what an alias's row does to its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .words import show

Change = Callable[[Any], Any]
"""Turns the other project's value into ours; ValueError says why it cannot."""


def one_of(table: dict[Any, Any], instead: str) -> Change:
    def change(value: Any) -> Any:
        try:
            return table[value.lower() if isinstance(value, str) else value]
        except (KeyError, TypeError):
            raise ValueError(f"{show(value)} has no counterpart. {instead}") from None

    return change


def whole(value: Any) -> Any:
    """LLaMA-Factory writes epochs as 3.0."""
    return int(value) if isinstance(value, float) and value == int(value) else value


def steps_or_none(value: Any) -> Any:
    """-1 is how Hugging Face says: not given."""
    return None if value == -1 else whole(value)


def no_warmup(value: Any) -> Any:
    if value == 0 and not isinstance(value, bool):
        return 0.0
    raise ValueError(f"{show(value)} steps are no share of them. Write training.warmup_ratio, such as 0.03.")


def step_count(value: Any) -> Any:
    if isinstance(value, float) and 0 < value < 1:
        raise ValueError(
            f"{value} is a share of the run. Write a number of steps, or saves_per_epoch / evals_per_epoch."
        )
    return whole(value)


def names(value: Any) -> Any:
    """`q_proj,v_proj` as a list; `all` as our word for it."""
    if not isinstance(value, str):
        return value
    if value in ("all", "all-linear", "all_linear"):
        return "all-linear"
    names = [name.strip() for name in value.split(",")]
    return names if len(names) > 1 else value if set(value) & set("*^$|()[]\\") else names


def list_of_names(value: Any) -> Any:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def pissa(value: Any) -> Any:
    """LLaMA-Factory says whether; we say which start."""
    return "pissa" if value is True else True if value is False else value


def all_linear(value: Any) -> Any:
    if value is True:
        return "all-linear"
    raise ValueError(
        "false leaves nothing to adapt. Write lora_target_modules: [q_proj, v_proj], and remove this key."
    )


def switch(word: str, instead: str) -> Change:
    """A switch whose `true` is `word`; `false` and `auto` leave the choice to us."""

    def change(value: Any) -> Any:
        if value is True:
            return word
        if value is False or value == "auto":
            return None
        raise ValueError(f"{show(value)} is not true, false or auto. {instead}")

    return change


def switched_section(value: Any) -> Any:
    """A switch of a section: with its defaults, or none."""
    if isinstance(value, bool):
        return {} if value else False
    raise ValueError(f"{show(value)} is not true or false.")


def reported(value: Any) -> Any:
    """Hugging Face's list of trackers; what it does not name is told nothing."""
    names = [value] if isinstance(value, str) else value
    known = ("mlflow", "tensorboard", "wandb")
    if names in (["none"], []):
        return {"mlflow": False}
    if names == ["all"]:
        return dict.fromkeys(known, True)
    if not isinstance(names, list) or any(name not in known for name in names):
        raise ValueError(f"{show(value)} has no counterpart. Write any of {', '.join(known)}, or none.")
    return {"mlflow": False, **dict.fromkeys(names, True)}


def opposite(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    raise ValueError(f"{show(value)} is not true or false.")


def adapter_type(value: Any) -> Any:
    if value == "qlora":
        raise ValueError("'qlora' is LoRA on a 4-bit base. Write lora, and model.load_in_4bit: true.")
    if isinstance(value, str):
        return value.lower().replace("-", "_")
    raise ValueError(f"{show(value)} is not a method. List them: raypeft methods")


def finetuning_type(value: Any) -> Any:
    if value in ("full", "freeze"):
        raise ValueError(
            f"'{value}' trains the base itself; this trains adapters. List them: raypeft methods"
        )
    return adapter_type(value)


def strategy(steps_key: str) -> Change:
    def change(value: Any) -> Any:
        if value == "epoch":
            return 1
        if value == "steps":
            return None
        raise ValueError(f"{show(value)} has no counterpart. Write {steps_key} with a number of steps.")

    return change


def dtype(value: Any) -> Any:
    """`torch.bfloat16` and `bf16` as torch names it."""
    if isinstance(value, str):
        word = value.removeprefix("torch.")
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(word, word)
    return value


OPTIMIZERS = one_of(
    {
        "adamw": "adamw",
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "sgd": "sgd",
    },
    "Write training.optimizer: adamw or sgd.",
)
SCHEDULERS = one_of(
    {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"},
    "Write training.lr_scheduler: constant, linear or cosine.",
)
OVERLONG = one_of(
    {"drop": "drop", "truncate": "truncate", "raise": "error"},
    "Write data.overlong: truncate, drop or error.",
)
CHECKPOINTING = one_of(
    {True: True, False: False, "auto": "auto", "true": True, "false": False},
    "Write training.gradient_checkpointing: true, false or auto.",
)
