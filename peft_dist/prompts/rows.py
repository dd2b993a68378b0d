"""Which prompt adapter serves which row of a batch, and the virtual tokens of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_dist.contract import PastMethod
from peft_dist.errors import AdapterError, RowsError
from peft_dist.prompts.adapters import PromptAdapters
from peft_dist.prompts.block import Block, Pick, is_in_decoder
from peft_dist.prompts.decoder_positions import DecoderPositions
from peft_dist.sharding import is_partitioned, reach, rests_in_pieces


class PromptRows:
    """The rows of one call of a model, and their prompt adapters.

    Attributes:
        model: with the adapters. current: who serves which row now.
        positions: those that a decoder is to count. rows_of_each: rows of each sequence in a step of a beam search.
    """

    def __init__(self, model: PromptAdapters) -> None:
        self.model = model
        self.current = model._adapters.current
        self.positions = DecoderPositions(model.get_base_model())
        self.rows_of_each = 1

    @property
    def base(self) -> Any:
        """The model's base, with its wrapped layers in it."""
        return self.model.get_base_model()

    def prompt_of(self, choice: str | None) -> str | None:
        """The prompt adapter of rows of that choice; None is the active adapters."""
        names: Any = self.model.active_adapters if choice is None else [choice]
        prompts = [name for name in names if name in self.model.adapters]
        if len(prompts) > 1:
            raise AdapterError(
                f"prompt adapters {', '.join(prompts)} are active at once. Activate one of them."
            )
        return prompts[0] if prompts else None

    def any(self) -> bool:
        """Whether any row has one."""
        if self.model.disabled or not self.model.adapters:
            return False
        rows = self.current.rows
        choices = (
            [s.adapter for s in rows.segments] if rows is not None and rows.adapters is not None else [None]
        )
        return any(self.prompt_of(choice) is not None for choice in choices)

    def others_may_prompt(self) -> bool:
        """Whether another rank may run this batch with virtual tokens, and so ask for the partitioned
        embeddings before the base's forward: all ranks must gather weights in one order."""
        return (
            bool(self.model.adapters)
            and not self.model.disabled
            and is_partitioned(self.model.base.parameter)
        )

    def choose(self) -> bool:
        """Whether each row names its own."""
        rows = self.current.rows
        return rows is not None and rows.adapters is not None

    def names(self, num_rows: int) -> list[str | None]:
        """The prompt adapter of each row."""
        rows = self.current.rows
        choices = [None] * num_rows if rows is None or rows.adapters is None else list(rows.adapters)
        if len(choices) != num_rows:
            raise AdapterError(
                f"{len(choices)} adapters are named for {num_rows} sequences. Name one for each."
            )
        if self.model.disabled:
            return [None] * num_rows
        return [self.prompt_of(choice) for choice in choices]

    def given(self, name: str, names: Sequence[str | None]) -> dict[str, Tensor]:
        """All that the adapter's method finds in `p`: its tensors, and what it reads of its rows."""
        self.model.check_filled(name)
        p: dict[str, Tensor] = self.current.run_with(self.model.tensors(name))
        reach(self.model, p.values())
        mine = [row for row, other in enumerate(names) if other == name]
        for key in self.model.methods[name].reads:
            value = self.current.batch.get(key)
            if value is None:
                continue
            if len(value) == 1:
                value = value.expand(len(names), *value.shape[1:])
            # Under beam search each sequence has several rows.
            if len(names) not in (len(value), len(value) * self.rows_of_each):
                raise RowsError(f"{key}: {len(value)} entries for {len(names)} sequences. Give one for each.")
            p[key] = value.repeat_interleave(len(names) // len(value), 0)[mine]
        return p

    def reach_all(self) -> None:
        """Gathers what rests in pieces of every adapter, where each row names its own: ranks may name different
        ones."""
        for name in self.model.adapters if self.choose() else ():
            reach(self.model, (t for t in self.model.tensors(name).values() if rests_in_pieces(t)))

    def have_tokens(self, names: Sequence[str | None]) -> bool:
        """Whether tokens stand before any of the rows, in place of keys and values."""
        methods = self.model.methods
        return any(name is not None and not isinstance(methods[name], PastMethod) for name in names)

    def block(self, names: Sequence[str | None], pick: Pick, like: Tensor) -> Block:
        """The virtual tokens of each row that `pick` takes, in the dtype of `like` (B, T, width)."""
        made: dict[str | None, Tensor] = {}
        # In one order on every rank, since a user's own engine may have partitioned them.
        for name in distinct(names):
            method = self.model.methods[name]
            if isinstance(method, PastMethod):
                continue
            tokens = pick(method, method.embeds(self.given(name, names), self.model.training))
            if tokens is not None:
                made[name] = tokens.to(like.dtype)
        numbers = tuple(made[name].shape[-2] if name in made else 0 for name in names)
        longest = max(numbers, default=0)
        if not longest:
            return Block(None, numbers, like.device)
        if all(name == names[0] for name in names):
            tokens = made[names[0]]
            whole = tokens if tokens.ndim == 3 else tokens.expand(len(names), -1, -1)
            return Block(whole, numbers, like.device)
        used: dict[str | None, int] = {}
        rows = []
        for adapter, count in zip(names, numbers, strict=True):
            row = like.new_zeros(longest - count, like.shape[2])
            if count:
                tokens = made[adapter]
                row = torch.cat([row, tokens[used.get(adapter, 0)] if tokens.ndim == 3 else tokens])
                used[adapter] = used.get(adapter, 0) + 1
            rows.append(row)
        return Block(torch.stack(rows), numbers, like.device)

    def counts(self, names: Sequence[str | None], device: Any, decoder: bool = False) -> tuple[Block, Block]:
        """How many virtual tokens rows have before their own, and how many in the past; in the decoder if
        asked."""
        before, behind = [0] * len(names), [0] * len(names)
        for row, name in enumerate(names):
            method = self.model.methods[name] if name is not None else None
            if isinstance(method, PastMethod):
                behind[row] = method.num_tokens
            elif method is not None and (not decoder or is_in_decoder(method)):
                before[row] = method.num_tokens
        return Block(None, tuple(before), device), Block(None, tuple(behind), device)


def distinct(names: Sequence[str | None]) -> list[str]:
    """The adapters among `names`, in one order on every rank."""
    return list(dict.fromkeys(name for name in names if name is not None))
