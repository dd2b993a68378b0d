"""Whether a model can be learned from: what runs it, or reads its weights, needs their values."""

from __future__ import annotations

from torch import nn

from peft_dist.errors import ConfigError
from peft_dist.sharding import bare, base_of


def check_filled(model: nn.Module, where: str) -> None:
    """Raises ConfigError where the base is on the meta device; `where` is what was called."""
    base = base_of(model)
    with bare(base):
        empty = [name for name, p in base.named_parameters() if p.is_meta]
    if empty:
        raise ConfigError(
            f"{where}: {len(empty)} weights, such as {empty[0]!r}, are on the meta device and have no values. Load "
            "the base first: peft_dist.load_base(..., into=model)."
        )
