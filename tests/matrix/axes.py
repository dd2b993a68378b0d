"""The axes of the matrix: every method, how training is sharded, how the base is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tests.distributed import one_process as run

METHODS = tuple(run.METHODS)

ALONE = "one process"
OFFLOAD = "zero3-offload"
# Name -> (ZeRO stage, how many ranks).
STAGES = {ALONE: (0, 1), "ZeRO-1": (1, 2), "ZeRO-2": (2, 2), "ZeRO-3": (3, 2), OFFLOAD: (3, 2)}
STORAGES = ("fp32", "bf16", "int8", "nf4", "nf4 in floats")

# What every cell is asked, by what it is called in the tables.
CHECKS = {
    "injects": "before or after partitioning, or on meta and filled later, with the values of one process",
    "trains": "losses and gradients are one process's, whether the base was left in train or in eval mode",
    "mixed": "ranks that name adapters of their own, disjoint, and one that none names",
    "saves": "the adapter alone is gathered, one rank writes, and one process that loads it gives the same logits",
    "loads": "adapters added, loaded and filled while training; the next step starts from their values",
    "merges": "into the stored weights, on every rank, and out again to the bit",
    "engine": "a user's own deepspeed.initialize, engine.backward and engine.step train to one process's losses",
    "holds": "no rank has more than its share of the base's bytes at rest",
    "truth": "counts and states are those that one process reports",
}

# The only methods that may refuse to merge; training, saving and loading may be refused for none.
NOT_MERGED = frozenset(
    {
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "CPT",
        "ADAPTION_PROMPT",
        "XLORA",
        "POLY",
    }
)

# What .ci/run runs of it: every method at each of these. `tests/distributed/test_equal_to_one_process.py` runs every
# method at stages 0 to 3 on a base that is neither cut to half precision nor quantised.
DIAGONAL = (
    (OFFLOAD, "fp32"),
    ("ZeRO-3", "bf16"),
    ("ZeRO-3", "int8"),
    ("ZeRO-3", "nf4"),
    (OFFLOAD, "nf4 in floats"),
)


Arrival = Literal["adapters last", "adapters first", "adapters on meta"]
# The base is partitioned and then adapted; adapted and then partitioned; adapted on the meta device, and then both get
# their values.
ARRIVALS: tuple[Arrival, ...] = ("adapters last", "adapters first", "adapters on meta")


@dataclass(frozen=True)
class Cell:
    """One method on one base, and how it is to be brought there."""

    method: str
    stage: str
    storage: str

    @property
    def zero_stage(self) -> int:
        """The stage by its number."""
        return STAGES[self.stage][0]

    @property
    def partitions(self) -> bool:
        """Whether the base rests in pieces."""
        return self.zero_stage == 3

    @property
    def arrival(self) -> Arrival:
        """How base and adapters come together."""
        return ARRIVALS[self._place % 3]

    @property
    def eval_mode(self) -> bool:
        """Whether the base's own modules are left in eval mode, as `from_pretrained` leaves them."""
        return self._place // 3 % 2 == (self.stage == OFFLOAD)

    @property
    def _place(self) -> int:
        # Over the storages a method meets every arrival, over the methods each with both modes.
        return METHODS.index(self.method) + STORAGES.index(self.storage)


def groups() -> Iterator[tuple[str, str]]:
    """(stage, storage): what a pair of processes, or one, runs all methods at."""
    return ((stage, storage) for storage in STORAGES for stage in STAGES)
