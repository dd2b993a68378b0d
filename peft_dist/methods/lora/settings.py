"""The settings of LoRA's variants, as HF PEFT nests them in a LoraConfig. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from peft_dist.errors import ConfigError


@dataclass
class LoraRuntimeConfig:
    """What concerns this run alone and is not saved.

    Args:
        ephemeral_gpu_offload: compute DoRA's start on a GPU for layers that rest on the CPU.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig:
    """LoftQ (arXiv:2310.08659).

    Args:
        loftq_bits: bits that the base is quantised to: 2, 4 or 8. loftq_iter: alternations, at least 1.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig:
    """EVA (arXiv:2410.07170).

    Args:
        rho: a layer's rank is at most rho x r; at least 1, which leaves every rank r.
        tau: a direction has converged when its cosine with the last batch's exceeds it; in [0, 1].
        use_label_mask: leave out positions whose label is `label_mask_value`.
        label_mask_value: of positions that carry no loss.
        whiten: divide directions by their singular values.
        adjust_scaling_factors: scale alpha with the rank that a layer was given.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ConfigError(f"EvaConfig.rho: {self.rho!r}; it is at least 1.0.")
        if not 0.0 <= self.tau <= 1.0:
            raise ConfigError(f"EvaConfig.tau: {self.tau!r}; it lies between 0.0 and 1.0.")


@dataclass
class CordaConfig:
    """CorDA (arXiv:2406.05223).

    Args:
        cache_file: where the decompositions are kept for later runs. covariance_file: the same of the inputs'
            covariances.
        corda_method: "ipm" takes the directions that the samples use most, "kpm" those they use least.
        verbose: print the progress. use_float16_for_covariance: gather covariances in fp16.
        prune_temporary_fields: let go of covariances once they are decomposed.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


def nested(owner: str, value: Any, kind: type) -> Any:
    """`value` as an object of `kind`: given as one, or as the dictionary that a file holds.

    Raises:
        ConfigError: it is neither; `owner` names the field.
    """
    if value is None or isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        known = {f.name for f in fields(kind)}
        return kind(**{key: item for key, item in value.items() if key in known})
    raise ConfigError(f"{owner}: {value!r}; it is a {kind.__name__}, its dictionary, or None.")
