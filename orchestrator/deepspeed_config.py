"""The job's `deepspeed` -> the dict that DeepSpeed is given. Pure; DeepSpeed itself is not imported.

Stages 0 to 2 leave the frozen base whole on every worker; AdapterOptimizer shards the adapter's optimizer states
(1) and gradients (2). Stage 3 has DeepSpeed partition the base, whose pieces rest in the nodes' memory where
`offload_param` says so. Precision is ours at every stage: DeepSpeed's fp16
and bf16 sections stay off, since they would cast every floating parameter.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from .spec.deepspeed_keys import check_deepspeed, keys_without_effect, offload_param, ours, zero_stage
from .spec.job import JobSpec
from .spec.places import Tree, raise_all

_STAGE_3 = {
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": 0,
}
"""What each key of stage 3 becomes where it is absent or `auto`. Nothing stays gathered between uses: a threshold
above 0 would keep small frozen tensors whole on every worker, a distance above 0 what a backward will use again."""


def deepspeed_config(spec: JobSpec, hidden: int | None = None) -> dict[str, Any]:
    """The whole config: the user's, `auto` filled in, with the job's own batch, clipping and precision.

    Args:
        spec: the job.
        hidden: the base's hidden size, from which stage 3's prefetch follows; None where it is not known.

    Raises:
        SpecError: a key contradicts the job (both are named), or is not there yet.
    """
    raise_all(Tree("deepspeed").errors(check_deepspeed(spec)))
    stage = zero_stage(spec.deepspeed)
    config: dict[str, Any] = {} if isinstance(spec.deepspeed, str) else deepcopy(spec.deepspeed)
    for key in keys_without_effect(config):
        _remove(config, key)
    zero = config.get("zero_optimization") or {}
    zero = {key: value for key, value in zero.items() if value != "auto" and key != "offload_param"}
    zero["stage"] = stage
    if stage == 3:
        zero = {**_STAGE_3, **zero}
        if (offload := offload_param(spec.deepspeed)) is not None:
            zero["offload_param"] = offload
        if zero["stage3_prefetch_bucket_size"] == "auto":
            zero["stage3_prefetch_bucket_size"] = int(0.9 * hidden * hidden) if hidden else 50_000_000
    config = {key: value for key, value in config.items() if value != "auto"}
    return {
        **config,
        **{key: value for key, (_, value) in ours(spec).items()},
        "zero_optimization": zero,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
    }


def _remove(config: dict[str, Any], key: str) -> None:
    *way, last = key.split(".")
    for part in way:
        config = config[part]
    del config[last]


def warnings(spec: JobSpec) -> list[str]:
    """One sentence where the user's config has keys that change nothing here."""
    keys = keys_without_effect(spec.deepspeed)
    if not keys:
        return []
    return [
        f"deepspeed: no effect here: {', '.join(keys)}. The adapter's states and gradients are sharded by"
        " raypeft's own optimizer; write training.* for what it does."
    ]
