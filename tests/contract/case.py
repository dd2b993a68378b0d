"""What a file of `tests/contract/methods/` holds: `CASES`, on which the laws run, and `PARITY`, on which HF PEFT
is the oracle. A method is tested by having such a file."""

from __future__ import annotations

from dataclasses import dataclass

from peft_dist.catalog import config_class
from peft_dist.config import PeftConfig


@dataclass(frozen=True)
class Case:
    """One config of a method, and the layer kinds that it sits on. `is_fresh`: it changes nothing at its
    start."""

    method: str
    label: str
    values: dict
    kinds: tuple[str, ...]
    is_fresh: bool = True

    def config(self, **more) -> PeftConfig:
        return config_class(self.method)(**{**self.values, **more})


LINEAR = ("linear", "linear without bias", "Conv1D")
CONVS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class Parity:
    """One config that both libraries know.

    Args:
        base: the name of a function in `tests.contract.bases`, which makes the base.
        config: the config's class name in both.
        values: its fields.
        forward: more arguments of both models' forward, by name, as nested lists.
    """

    base: str
    config: str
    values: dict
    forward: dict | None = None
