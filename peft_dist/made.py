"""What adapters' methods make of their tensors for all layers at once, in one forward of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from peft_dist import saved_tensors
from peft_dist.contract import Method, Params
from peft_dist.sharding import is_partitioned


class Made:
    """Kept while one forward of a model runs, and made at the first layer that asks.

    Args:
        sites: adapter -> the tensors of its method at each of its layers, by the layer's name.
    """

    def __init__(self, sites: Callable[[str], Mapping[str, Params]]) -> None:
        self._sites = sites
        self._made: dict[str, Mapping[str, Params]] = {}

    def at(self, site: str, adapter: str, method: Method) -> Params:
        """What the layer called `site` finds; nothing where no gradient is wanted, and where a recomputed forward has
        to save just what this one does."""
        if not torch.is_grad_enabled() or _is_special():
            return {}
        if adapter not in self._made:
            sites = self._sites(adapter)
            is_whole = not any(is_partitioned(t) or t.is_meta for p in sites.values() for t in p.values())
            self._made[adapter] = method.made(sites) if is_whole else {}
        return self._made[adapter].get(site, {})


def _is_special() -> bool:
    return (
        torch.compiler.is_compiling()
        or saved_tensors.are_hooked()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
    )


def makes(method: type[Any]) -> bool:
    """Whether methods of this class make anything so."""
    return method.made is not Method.made
