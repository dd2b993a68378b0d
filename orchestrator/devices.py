"""Which backend, device and precision a worker uses: pure functions of the spec, the plan and what a rank
sees.

No torch and no Ray here: `train.worker.entry` collects the facts, these functions decide, and the tests hand in
facts of machines that are not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
Backend = Literal["nccl", "gloo"]

BF16_CAPABILITY = (8, 0)
"""The first CUDA capability with bf16 units (Ampere)."""

LARGE_BASE = 1_000_000_000
"""Parameters from which `gradient_checkpointing: auto` recomputes activations on CPU too."""


@dataclass(frozen=True)
class RankFacts:
    """What one worker sees of itself, as Ray and torch tell it.

    Args:
        rank, world_size: among all workers.
        local_rank, node_rank: `LOCAL_RANK` and `NODE_RANK`.
        assigned: ids of the GPUs that Ray gave to this worker, as strings (an index or a UUID).
        visible: `CUDA_VISIBLE_DEVICES`, split; None where the variable is not set. Ray Train widens it to all
            GPUs of the workers on one node, so the own GPU is not always the first one.
        num_cuda: devices that torch can use; 0 without a driver, whatever Ray was told.
        capability: CUDA capability of the own device, None without one.
        has_nccl: whether torch was built with nccl.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node_rank: int = 0
    assigned: tuple[str, ...] = ()
    visible: tuple[str, ...] | None = None
    num_cuda: int = 0
    capability: tuple[int, int] | None = None
    has_nccl: bool = False


def device_of(facts: RankFacts) -> str:
    """`cpu`, or `cuda:INDEX` for the GPU that Ray gave this worker.

    The index counts within `CUDA_VISIBLE_DEVICES`. A worker without a GPU of its own stays on the CPU, also
    on a machine that has GPUs; a GPU that exists in Ray's books alone (`num_gpus` on a machine without any)
    is the CPU.
    """
    if not facts.assigned or facts.num_cuda == 0:
        return "cpu"
    own = facts.assigned[0]
    if facts.visible is not None and own in facts.visible:
        index = facts.visible.index(own)
    elif own.isdigit() and facts.visible is None:
        index = int(own)
    else:
        index = facts.local_rank
    return f"cuda:{index % facts.num_cuda}"


def backend_of(facts: Sequence[RankFacts]) -> Backend:
    """`nccl` where every rank has a GPU of its own, else `gloo`.

    nccl refuses two ranks on one GPU, as fractions of a GPU give them.
    """
    devices = [(fact.node_rank, device_of(fact)) for fact in facts]
    on_gpu = all(device != "cpu" for _, device in devices)
    exclusive = len(set(devices)) == len(devices)
    return "nccl" if on_gpu and exclusive and all(fact.has_nccl for fact in facts) else "gloo"


def precision_of(asked: str, facts: Sequence[RankFacts]) -> Precision:
    """The dtype of the base and of activations, one for all ranks.

    `auto` is bf16 where every rank's GPU has it, else fp32; anything else is what was asked for.
    """
    if asked != "auto":
        return asked  # type: ignore[return-value]
    has_bf16 = all(
        device_of(fact) != "cpu" and fact.capability is not None and fact.capability >= BF16_CAPABILITY
        for fact in facts
    )
    return "bf16" if has_bf16 else "fp32"


def recomputes_activations(
    asked: bool | str, *, on_gpu: bool, num_parameters: int, keeps_past: bool = False
) -> bool:
    """Whether gradient checkpointing is on. `auto`: on a GPU, whose memory is the scarce thing, and for bases
    of a billion parameters and more; a small base on CPU has memory to spare and would only lose time.

    Args:
        keeps_past: whether the method needs the base's cache, which layers that run again in the backward have not.
    """
    if asked == "auto":
        return not keeps_past and (on_gpu or num_parameters >= LARGE_BASE)
    return bool(asked)
