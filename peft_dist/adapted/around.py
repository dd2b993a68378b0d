"""What stands around a whole module of the base, and is taken for it by whoever reads its attributes."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_dist.adapted.module import AdapterModule
from peft_dist.base_layer import Layer
from peft_dist.pool import AdapterPool
from peft_dist.pooled import PooledModule
from peft_dist.rows import Current


class Around(AdapterModule):
    """The root of the wrappers of whole modules.

    Attributes:
        original_module: the frozen module. base: its door.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        pool: AdapterPool,
        current: Current,
        base: Layer | None = None,
        common: PooledModule | None = None,
    ) -> None:
        super().__init__(pool, name, current, common)
        self.original_module: Any = module
        self.base = base or Layer(module, name)

    def __getattr__(self, attribute: str) -> Any:
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            module = super().__getattr__("original_module")
            if not hasattr(module, attribute) and (held := self._borrowed(attribute)) is not None:
                return held
            if attribute in ("in_features", "out_features") and not hasattr(module, attribute):
                return self._features()[attribute == "out_features"]
            return getattr(module, attribute)

    @property
    def base_layer(self) -> nn.Module:
        """The frozen module, under the name that `Adapted` gives it."""
        return self.original_module
