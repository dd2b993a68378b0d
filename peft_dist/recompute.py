"""Gradient checkpointing runs layers again in the backward, when the forward's rows are long gone: what the
model was running then is kept with each recomputation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from peft_dist.rows import Current


def layers(base: nn.Module) -> list[nn.Module]:
    """The modules of `base` that gradient checkpointing may run again."""
    return [module for module in base.modules() if _may_run_again(module)]


def _may_run_again(module: nn.Module) -> bool:
    name = "gradient_checkpointing"
    return name in module.__dict__ or hasattr(type(module), name)


def remember(modules: Iterable[nn.Module], current: Current) -> None:
    """Lets each of `modules` see, when it runs again, what `current` says now."""
    for module in modules:
        run = module.__dict__.get("_gradient_checkpointing_func")
        if run is not None and getattr(run, "current", None) is not current:
            module.__dict__["_gradient_checkpointing_func"] = Remembering(run, current)


class Remembering:
    """A checkpointing function whose layers find `current` as it was at the first run."""

    def __init__(self, run: Callable[..., Any], current: Current) -> None:
        self.run, self.current = run, current

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        then = dataclasses.replace(self.current)

        def rerun(*inputs: Any, **named: Any) -> Any:
            now = dataclasses.replace(self.current)
            self.current.take(then)
            try:
                return layer(*inputs, **named)
            finally:
                self.current.take(now)

        return self.run(rerun, *args, **kwargs)
