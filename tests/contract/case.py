"""What a file of `tests/contract/methods/` holds: `CASES`, on which the laws run, `PARITY`, on which HF PEFT is
the oracle, and `FIELDS`, what changing each of its config's fields does. A method is tested by having such a
file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import peft_dist
from peft_dist.catalog import config_class
from peft_dist.config import PeftConfig
from tests.contract import bases


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


def tensors_of(method: str, **values) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a checkpoint of an adapter of `method` on a small Llama. For fields whose default is too
    large for it."""
    model = peft_dist.get_peft_model(bases.llama(), config_class(method)(**values))
    return {key: tuple(t.shape) for key, t in peft_dist.get_peft_model_state_dict(model).items()}


LINEAR = ("linear", "linear without bias", "Conv1D")
CONVS = ("conv1d", "conv2d", "conv3d")
GROUPED = ("conv1d with groups", "conv2d with groups", "conv3d with groups")


@dataclass(frozen=True)
class Parity:
    """One config that both libraries know.

    Args:
        base: the name of a function in `tests.contract.bases`, which makes the base.
        config: the config's class name in both.
        values: its fields.
        forward: more arguments of both models' forward, by name, as nested lists.
        wrong_gradients: ends of the names of tensors whose gradient HF PEFT gets wrong.
        own_tensors: parts of the names of tensors that our files hold besides HF PEFT's.
    """

    base: str
    config: str
    values: dict
    forward: dict | None = None
    wrong_gradients: tuple[str, ...] = ()
    own_tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Field:
    """That a config with a field at `value` differs from one that leaves it at its default.

    Args:
        value: what the field is set to.
        changes: where the difference is seen. `error`: the config, or the injection, is refused, and the message
            names the field. `tensors`: names, shapes or dtypes of the adapter's tensors in a checkpoint.
            `trained`: which Parameters are. `start`: their values at the start. `output`: the model's, in
            evaluation, with the same (seeded) values in the adapter. `training`: the same while training (one
            seed). `loss`: `outputs.loss` while training. `gradient`: gradients of that loss. `saved`: what
            `adapter_config.json` says of another field, or of this one where the base corrects it.
        given: other fields, in both configs.
        base: the name of a function in `tests.contract.bases`.
        forward: more arguments of the forward, as nested lists.
    """

    value: object
    changes: Literal[
        "error", "tensors", "trained", "start", "output", "training", "loss", "gradient", "saved"
    ]
    given: dict = field(default_factory=dict)
    base: str = "llama"
    forward: dict = field(default_factory=dict)
