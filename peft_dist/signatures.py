"""A PeftModel's forward and generate with the base's own signature and help."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from peft_dist.config import PeftConfig
from peft_dist.errors import PeftDistError


def update_forward_signature(model: Any) -> None:
    """`model.forward` shows the base's signature, for programs that look at it."""
    _shows_base(model, "forward")


def update_generate_signature(model: Any) -> None:
    """`model.generate` shows the base's signature."""
    if hasattr(model.get_base_model(), "generate"):
        _shows_base(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """Both, or one of them.

    Raises:
        ValueError: `method` is none of "forward", "generate", "all".
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(
            f"method {method} is not supported please choose one of ['forward', 'generate', 'all']"
        )
    if method in ("forward", "all"):
        update_forward_signature(model)
    if method in ("generate", "all"):
        update_generate_signature(model)


def check_if_peft_model(model_name_or_path: str | Path) -> bool:
    """Whether a directory or a hub id holds an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (PeftDistError, OSError, ValueError, TypeError):
        return False
    return True


def _shows_base(model: Any, name: str) -> None:
    own, base = getattr(type(model), name), getattr(type(model.get_base_model()), name)

    @functools.wraps(base, assigned=("__doc__", "__name__", "__annotations__"))
    def shown(*args: Any, **kwargs: Any) -> Any:
        return own(model, *args, **kwargs)

    signature = inspect.signature(base)
    shown.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p for key, p in signature.parameters.items() if key != "self"]
    )
    object.__setattr__(model, name, shown)
