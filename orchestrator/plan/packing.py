"""What `data.sample_packing` comes to for a base: known from its config, or tried by the workers before they train."""

from __future__ import annotations

from collections.abc import Iterator

from ..spec.job import JobSpec
from ..spec.places import Problem
from .model_sizes import ModelSizes

_BY_DISTANCE = ("bloom", "mpt")
_WITH_STATES = (
    "mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "bamba", "zamba", "zamba2", "nemotron_h",
    "granitemoehybrid", "lfm2", "lfm2_moe", "qwen3_next", "qwen3_5", "falcon_h1", "xlstm", "minimax", "olmo_hybrid",
    "kimi_linear",
)  # fmt: skip


def unpackable(spec: JobSpec, sizes: ModelSizes | None) -> Iterator[Problem]:
    """Why rows on this base cannot share a sequence, where that is known."""
    if not spec.data.sample_packing or sizes is None:
        return
    why = None
    if sizes.model_type in _BY_DISTANCE:
        why = f"{sizes.model_type} knows a token by its distance to others, and not by a position that begins anew"
    elif sizes.model_type in _WITH_STATES:
        why = f"layers of {sizes.model_type} hand a state from token to token, past the end of a row"
    if why:
        yield Problem(("data", "sample_packing"), f"true: {why}.", "Set it to false for this base.")


def packed_length(spec: JobSpec, allowed: int, longest: int | None, rows_per_worker: int) -> int:
    """Tokens of the longest sequence that rows of one step share on a worker."""
    return allowed if longest is None else min(allowed, longest * max(1, rows_per_worker))
