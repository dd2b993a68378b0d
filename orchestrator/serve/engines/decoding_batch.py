"""Texts that an encoder has read and its decoder writes, a token of each a step; others join between two steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from peft_dist.prompts.base import BY_DISTANCE
from peft_dist.rows import BASE, Rows


class DecodingBatch:
    """Rows that go through the model together.

    Each row's keys and values end at the same place, so that the next token's stand behind all of them; a row that
    joined later has room before its own, which nobody attends to. A decoder that knows a token's place by its distance
    to others alone is not told of it; of other decoders, and behind virtual tokens, batches do not join.

    Args:
        model: a PeftModel of an encoder with a decoder.
        rows: whoever they are; they are only kept in order.
        adapters: of each row; None: the bare base. They bring the same kind and number of virtual tokens.
        inputs: `input_ids` and `attention_mask` (rows, positions), padded at the end.
        reads: what adapters read of each row: name -> (rows,).
        start: the token with which a decoder begins.
        joins: whether others may join, as far as the model goes.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Any],
        adapters: Sequence[str | None],
        inputs: Mapping[str, Tensor],
        reads: Mapping[str, Tensor],
        start: int,
        *,
        joins: bool = True,
    ) -> None:
        self._model = model
        self.rows = list(rows)
        self._adapters = [adapter or BASE for adapter in adapters]
        self._reads = dict(reads)
        self._given: dict[str, Tensor] = dict(inputs)
        self._mask = inputs["attention_mask"]
        self._tokens = torch.full((len(self.rows), 1), start, device=self._mask.device)
        self._hidden = torch.empty(0)
        self._cache: Any = None
        # Which of the cached positions are a row's own.
        self._own = self._mask.new_zeros(len(self.rows), 0)
        by_distance = getattr(model.get_base_model().config, "model_type", None) in BY_DISTANCE
        self._joins = (
            joins and by_distance and not any(adapter in model.adapters for adapter in self._adapters)
        )

    @property
    def num_read(self) -> int:
        """Positions of the longest text."""
        return int(self._mask.shape[1])

    def step(self) -> Tensor:
        """The scores (rows, vocabulary) of each row's next token, in fp32."""
        with self._model.using(Rows(adapters=tuple(self._adapters))):
            out = self._begun() if self._cache is None else self._continued()
        self._cache = out.past_key_values
        self._own = F.pad(self._own, (0, 1), value=1)
        return out.logits[:, -1].float()

    def take(self, tokens: Sequence[int]) -> None:
        """The tokens that come next, one a row."""
        self._tokens = torch.tensor(tokens, device=self._mask.device)[:, None]

    def keep(self, places: Sequence[int]) -> None:
        """Goes on with these rows alone, and without what only the others needed."""
        if len(places) == len(self.rows):
            return
        index = torch.tensor(places, device=self._mask.device, dtype=torch.long)
        self.rows = [self.rows[place] for place in places]
        self._adapters = [self._adapters[place] for place in places]
        self._reads = {name: t[index] for name, t in self._reads.items()}
        self._tokens, self._mask, self._own = self._tokens[index], self._mask[index], self._own[index]
        if self._cache is None:
            self._given = {name: t[index] for name, t in self._given.items()}
            return
        self._hidden = self._hidden[index]
        unused, read = 0, self._mask.shape[1]
        if self._joins and len(places):
            unused = int((self._own.cumsum(1) == 0).sum(1).min())
            read = int(self._mask.sum(1).max())
        self._own, self._mask, self._hidden = (
            self._own[:, unused:],
            self._mask[:, :read],
            self._hidden[:, :read],
        )
        for layer in self._cache.self_attention_cache.layers:
            layer.keys, layer.values = (t[index, :, unused:] for t in (layer.keys, layer.values))
        for layer in self._cache.cross_attention_cache.layers:
            layer.keys, layer.values = (t[index, :, :read] for t in (layer.keys, layer.values))

    def can_join(self, other: DecodingBatch) -> bool:
        """Whether the rows of another, begun batch may become this one's, with little padding."""
        least, most = sorted((self.num_read, other.num_read))
        begun = self._cache is not None and other._cache is not None
        return begun and self._joins and other._joins and most <= 2 * least + 16

    def join(self, other: DecodingBatch) -> None:
        """Takes the rows of another batch, which is used up."""
        self.rows += other.rows
        self._adapters += other._adapters
        names = self._reads.keys() | other._reads.keys()
        self._reads = {name: torch.cat([self._read(name), other._read(name)]) for name in names}
        self._tokens = torch.cat([self._tokens, other._tokens])
        self._own = _behind(self._own, other._own, 1, at_end=False)
        self._mask = _behind(self._mask, other._mask, 1)
        self._hidden = _behind(self._hidden, other._hidden, 1)
        caches = (self._cache.self_attention_cache, other._cache.self_attention_cache)
        _join_layers(*caches, at_end=False)
        caches = (self._cache.cross_attention_cache, other._cache.cross_attention_cache)
        _join_layers(*caches, at_end=True)

    def _read(self, name: str) -> Tensor:
        found = self._reads.get(name)
        return self._tokens.new_zeros(len(self._tokens)) if found is None else found

    def _begun(self) -> Any:
        out = self._model(**self._given, **self._reads, decoder_input_ids=self._tokens, use_cache=True)
        self._hidden = out.encoder_last_hidden_state
        virtual = self._hidden.shape[1] - self._mask.shape[1]
        self._mask = F.pad(self._mask, (virtual, 0), value=1)
        self._given = {}
        return out

    def _continued(self) -> Any:
        own = F.pad(self._own, (0, 1), value=1)
        masked = {} if bool(own.all()) else {"decoder_attention_mask": own}
        return self._model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self._hidden),
            attention_mask=self._mask,
            decoder_input_ids=self._tokens,
            past_key_values=self._cache,
            use_cache=True,
            **masked,
            **self._reads,
        )


def _join_layers(cache: Any, other: Any, *, at_end: bool) -> None:
    for layer, others in zip(cache.layers, other.layers, strict=True):
        layer.keys = _behind(layer.keys, others.keys, 2, at_end=at_end)
        layer.values = _behind(layer.values, others.values, 2, at_end=at_end)


def _behind(first: Tensor, second: Tensor, dim: int, *, at_end: bool = True) -> Tensor:
    """The rows of two tensors, filled up with zeros to one length of `dim`."""
    length = max(first.shape[dim], second.shape[dim])
    filled = []
    for t in (first, second):
        missing = length - t.shape[dim]
        pads = [0, 0] * (t.ndim - 1 - dim) + ([0, missing] if at_end else [missing, 0])
        filled.append(F.pad(t, pads) if missing else t)
    return torch.cat(filled)
