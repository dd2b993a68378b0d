"""Which keys of a user's DeepSpeed config are ours, which have no effect here, and which are not there yet.

Batch, precision, clipping and optimizer are the job's (`training.*`): the adapter's tensors belong to our own
AdapterOptimizer at every stage, so DeepSpeed never sees them. What DeepSpeed does here is to partition the frozen
base at stage 3, and with `offload_param` to keep its pieces in the nodes' memory rather than on the devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import closest
from .job import JobSpec
from .places import Path, Problem
from .rules import accumulation
from .words import show

STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3-offload": 3}
OFFLOAD = {"device": "cpu", "pin_memory": True}
"""`offload_param` of `zero3-offload`."""

NO_EFFECT = (
    "optimizer",
    "scheduler",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.allgather_partitions",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.elastic_checkpoint",
    "zero_optimization.ignore_unused_parameters",
    "zero_optimization.offload_optimizer",
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.reduce_scatter",
    "zero_optimization.round_robin_gradients",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.sub_group_size",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "checkpoint",
    "data_types",
)
"""Keys about an optimizer's states and gradients: ours are sharded by AdapterOptimizer."""

KNOWN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "fp16",
    "bf16",
    "amp",
    "torch_autocast",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "memory_breakdown",
    "comms_logger",
    "flops_profiler",
    "activation_checkpointing",
    "seed",
    "aio",
    *(key for key in NO_EFFECT if "." not in key),
)

KNOWN_ZERO = (
    "stage",
    "offload_param",
    "cpu_offload",
    "cpu_offload_params",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "memory_efficient_linear",
    "mics_shard_size",
    "mics_hierarchical_params_gather",
    "log_trace_cache_warnings",
    *(key.partition(".")[2] for key in NO_EFFECT if "." in key),
)

_NOT_YET = {
    "zero_optimization.zero_hpz_partition_size": "this version does not have it yet.",
    "zero_optimization.zero_quantized_weights": "this version does not have it yet.",
    "zero_optimization.zero_quantized_gradients": "this version does not have it yet.",
    "zero_optimization.mics_shard_size": "this version does not have it yet.",
    "activation_checkpointing": "activations are recomputed by training.gradient_checkpointing.",
    "amp": "precision is training.precision.",
    "torch_autocast": "precision is training.precision.",
    "aio": "nothing is kept on disks here.",
}

_OFFLOAD_KEYS = ("device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu", "ratio", "nvme_path")


def zero_stage(deepspeed: str | dict[str, Any]) -> int:
    """The stage of a job's `deepspeed`: a name, or a config whose `zero_optimization.stage` is 0 to 3 (0 if absent)."""
    if isinstance(deepspeed, str):
        return STAGES[deepspeed]
    zero = deepspeed.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    return stage if isinstance(stage, int) else 2


def check_deepspeed(spec: JobSpec) -> list[Problem]:
    """What in a user's config contradicts the job, is not there yet, or is misspelt."""
    if isinstance(spec.deepspeed, str):
        return []
    config = spec.deepspeed
    return [*_shape(config), *_not_yet(config), *_offload(config), *_conflicts(spec)]


def offload_param(deepspeed: str | dict[str, Any]) -> dict[str, Any] | None:
    """Where the base's pieces rest between uses: DeepSpeed's section; None for the devices themselves."""
    if isinstance(deepspeed, str):
        return dict(OFFLOAD) if deepspeed == "zero3-offload" else None
    section = _at(deepspeed, "zero_optimization.offload_param")
    if not isinstance(section, dict) or section.get("device", "cpu") == "none":
        return None
    return {key: value for key, value in {**OFFLOAD, **section}.items() if value != "auto"}


def keys_without_effect(deepspeed: str | dict[str, Any]) -> list[str]:
    """The keys of a user's config that change nothing here."""
    if isinstance(deepspeed, str):
        return []
    return [key for key in NO_EFFECT if _at(deepspeed, key) is not None]


def _at(config: dict[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _path(key: str) -> Path:
    return ("deepspeed", *key.split("."))


def _shape(config: dict[str, Any]) -> Iterator[Problem]:
    for key in config:
        if key not in KNOWN:
            yield _unknown(key, KNOWN)
    zero = config.get("zero_optimization")
    if zero is None:
        return
    if not isinstance(zero, dict):
        yield Problem(_path("zero_optimization"), "is not a mapping.", "Write zero_optimization: {stage: 2}.")
        return
    for key in zero:
        if key not in KNOWN_ZERO:
            yield _unknown(f"zero_optimization.{key}", [f"zero_optimization.{known}" for known in KNOWN_ZERO])
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3, "auto") or isinstance(stage, bool):
        yield Problem(_path("zero_optimization.stage"), f"{stage!r} is not a stage.", "Stages: 0, 1, 2, 3.")


def _unknown(key: str, known: tuple[str, ...] | list[str]) -> Problem:
    near = closest(key, known)
    return Problem(
        _path(key), "is not a key of DeepSpeed's config.", f"Closest: '{near[0]}'." if near else "Remove it."
    )


def _not_yet(config: dict[str, Any]) -> Iterator[Problem]:
    for key, why in _NOT_YET.items():
        if _at(config, key):
            yield Problem(_path(key), why, "Remove it.")


def _offload(config: dict[str, Any]) -> Iterator[Problem]:
    for key in ("cpu_offload", "cpu_offload_params"):
        if _at(config, f"zero_optimization.{key}"):
            yield Problem(
                _path(f"zero_optimization.{key}"),
                "is what DeepSpeed called it once.",
                "Write zero_optimization: {stage: 3, offload_param: {device: cpu}}.",
            )
    section, path = _at(config, "zero_optimization.offload_param"), "zero_optimization.offload_param"
    if section is None:
        return
    if not isinstance(section, dict):
        yield Problem(_path(path), "is not a mapping.", "Write offload_param: {device: cpu}.")
        return
    for key in section:
        if key not in _OFFLOAD_KEYS:
            yield _unknown(f"{path}.{key}", [f"{path}.{known}" for known in _OFFLOAD_KEYS])
    device = section.get("device", "cpu")
    if device not in ("cpu", "none"):
        yield Problem(
            _path(f"{path}.device"),
            f"{show(device)}: pieces of the base rest on the devices or in the nodes' memory.",
            "Write device: cpu, or none.",
        )
    elif device == "cpu" and zero_stage(config) != 3:
        yield Problem(
            _path(path),
            f"only stage 3 has pieces of the base to keep elsewhere; the stage is {zero_stage(config)}.",
            "Write zero_optimization.stage: 3, or remove it.",
        )


def ours(spec: JobSpec) -> dict[str, tuple[str, Any]]:
    """DeepSpeed's key -> (our key, our value), for all that the job itself decides."""
    steps, size = accumulation(spec)
    training = spec.training
    return {
        "train_batch_size": ("training.global_batch_size", size),
        "train_micro_batch_size_per_gpu": ("training.micro_batch_size", training.micro_batch_size),
        "gradient_accumulation_steps": ("training.gradient_accumulation_steps", steps),
        "gradient_clipping": ("training.max_grad_norm", training.max_grad_norm),
    }


def _conflicts(spec: JobSpec) -> Iterator[Problem]:
    assert isinstance(spec.deepspeed, dict)
    for key, (our_key, value) in ours(spec).items():
        written = spec.deepspeed.get(key)
        if written is not None and written != "auto" and written != value:
            yield Problem(
                _path(key),
                f"{written} contradicts {our_key}: {value}.",
                f"Write {our_key}, and 'auto' or nothing here.",
            )
    yield from _precision(spec)
    yield from _optimizer(spec)


def _precision(spec: JobSpec) -> Iterator[Problem]:
    assert isinstance(spec.deepspeed, dict)
    for key in ("fp16", "bf16"):
        enabled = _at(spec.deepspeed, f"{key}.enabled")
        ours_ = spec.training.precision
        if enabled is True and ours_ not in (key, "auto"):
            yield Problem(
                _path(f"{key}.enabled"),
                f"true contradicts training.precision: {ours_}.",
                "Write training.precision alone.",
            )
        elif enabled is False and ours_ == key:
            yield Problem(
                _path(f"{key}.enabled"),
                f"false contradicts training.precision: {key}.",
                "Write training.precision alone.",
            )
        elif enabled is True and ours_ == "auto":
            yield Problem(
                _path(f"{key}.enabled"),
                "true contradicts training.precision: auto, which is fp32 where there is no GPU.",
                f"Write training.precision: {key}, and 'auto' or nothing here.",
            )


_OPTIMIZER_KEYS = {"lr": "learning_rate", "weight_decay": "weight_decay"}


def _optimizer(spec: JobSpec) -> Iterator[Problem]:
    """A learning rate that nothing would read must not differ from the one that is used."""
    assert isinstance(spec.deepspeed, dict)
    parameters = _at(spec.deepspeed, "optimizer.params")
    if not isinstance(parameters, dict):
        return
    for key, name in _OPTIMIZER_KEYS.items():
        written, value = parameters.get(key), getattr(spec.training, name)
        if written is not None and written != "auto" and written != value:
            yield Problem(
                _path(f"optimizer.params.{key}"),
                f"{written} contradicts training.{name}: {value}.",
                f"Write training.{name} alone.",
            )
