"""Sequences that no packed row can hold beside others': each runs in rows of its own, step by step, with keys and
values of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from peft_dist.ahead import looks_ahead, reads_after_first_run, reads_of_first_run
from peft_dist.packed_rows import PackedRows, Reads

from .continuous import Packed, Part

_A_STEP = 4
"""Sequences that run apart beside one step of the batch: others wait for them."""

Run = Callable[[PackedRows, dict[str, Any]], Any]
"""The base's output of one packed row with the model's arguments for it."""


@dataclass(eq=False)
class Apart:
    """One such sequence.

    Args:
        adapter: that serves it. tokens: of its prompt, which are to run. need: tokens of keys and values that it will
            have in the end, of all its runs.
        reads: what its adapter's methods read of it.
    """

    name: str
    adapter: str
    tokens: list[int]
    need: int
    reads: Reads = ()
    num_done: int = 0
    caches: list[Any] = field(default_factory=list)


class ApartLane:
    """Who runs apart: as many at once as have room for their keys and values, in turns; the others wait.

    Args:
        model: a PeftModel. max_tokens: of keys and values together; one sequence runs however many it has.
        chunk: tokens of a prompt in one step.
        one_by_one: see `Packed`.
    """

    def __init__(self, model: Any, max_tokens: int, chunk: int, *, one_by_one: bool = False) -> None:
        self._model, self._base = model, model.get_base_model()
        self._max_tokens, self._chunk, self._one_by_one = max_tokens, chunk, one_by_one
        self._sequences: deque[Apart] = deque()

    def __len__(self) -> int:
        return len(self._sequences)

    def runs_of(self, adapter: str) -> int:
        """How often a sequence of this adapter is run: its keys and values are kept for each."""
        return 2 if looks_ahead(self._model.peft_config[adapter]) else 1

    def add(self, sequence: Apart) -> None:
        """A sequence that has tokens to run."""
        self._sequences.append(sequence)

    def finish(self, name: str) -> None:
        """Frees a sequence; one that is not here is passed over."""
        self._sequences = deque(each for each in self._sequences if each.name != name)

    def next_step(self) -> list[Apart]:
        """Those whose turn it is: they go behind those that have room, too."""
        room, num = self._max_tokens, 0
        for each in self._sequences:
            room -= each.need
            if room < 0 and num:
                break
            num += 1
        chosen = [self._sequences.popleft() for _ in range(min(num, _A_STEP))]
        for place, each in enumerate(chosen):
            self._sequences.insert(num - len(chosen) + place, each)
        return chosen

    def run(self, sequence: Apart, run: Run) -> tuple[int, Tensor | None]:
        """One step of a sequence: (tokens that it took, the next one's scores (vocabulary,) in fp32, or None where more
        of its prompt is to come)."""
        tokens = sequence.tokens[: self._chunk]
        is_last = len(tokens) == len(sequence.tokens)
        if not sequence.caches:
            config = self._base.config.get_text_config()
            sequence.caches = [DynamicCache(config=config) for _ in range(self.runs_of(sequence.adapter))]
        scores = self._scores(sequence, tokens, run, sequence.caches)
        sequence.num_done += len(tokens)
        del sequence.tokens[: len(tokens)]
        return len(tokens), scores if is_last else None

    def try_one(self, adapter: str, reads: Reads, run: Run) -> Tensor:
        """The scores of one token of an adapter, which is thereby seen to run."""
        sequence = Apart("", adapter, [0], 1, reads)
        return self._scores(sequence, [0], run, [None] * self.runs_of(adapter))

    def _scores(self, sequence: Apart, tokens: list[int], run: Run, caches: Sequence[Any]) -> Tensor:
        reads = sequence.reads
        if len(caches) > 1:
            first = self._model, sequence.adapter
            given = (*reads, *reads_of_first_run(*first, len(tokens)))
            states = self._one(
                sequence, tokens, given, run, caches[0], output_hidden_states=True
            ).hidden_states
            reads = (*reads, *reads_after_first_run(*first, states[-1]))
        return self._one(sequence, tokens, reads, run, caches[-1]).logits[0, -1].float()

    def _one(
        self, sequence: Apart, tokens: list[int], reads: Reads, run: Run, cache: Any, **options: Any
    ) -> Any:
        start, device = sequence.num_done, self._base.device
        rows = PackedRows(
            adapters=(sequence.adapter,),
            lengths=(len(tokens),),
            starts=(start,),
            reads=(reads,),
            kept=(0,),
            alone=self._one_by_one,
        )
        inputs = {
            "input_ids": torch.tensor([tokens], device=device),
            "position_ids": torch.arange(start, start + len(tokens), device=device)[None],
            "logits_to_keep": torch.tensor([len(tokens) - 1], device=device),
            "past_key_values": cache,
            "use_cache": cache is not None,
            "packed": Packed((Part(sequence.name, start, len(tokens), True),), self._one_by_one),
            **options,
        }
        return run(rows, inputs)
