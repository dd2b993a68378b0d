"""FEATURE_EXTRACTION: texts that belong together lie near one another. A target is an anchor.

A text's embedding is the mean of the last hidden states of its tokens, divided by its length. The loss is InfoNCE
(van den Oord et al., arXiv 1807.03748): the cross entropy of an anchor's own positive among the positives, and given
negatives, of the step's whole global batch, cosines over TEMPERATURE. A candidate with the same text as the own
positive is left out.

Nothing of it depends on the number of workers or micro-batches: embeddings are computed first, collected over all,
the loss's gradient is taken with respect to them, and a second forward carries it on (Gao et al., arXiv 2101.06983).
Both forwards are the same, for dropout follows from the sample. One micro-batch alone needs no second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.spec.job import DatasetSpec

from ..rows.chunks import chunks
from ..rows.outline import IGNORED, Outline
from ..rows.records import hash_of, present, text_in
from ..rows.sources import SourceRow
from .encoding import Encoded, encode, own_positions
from .task import Answering, Batch, Padded, Step, Task, pad_id

TEMPERATURE = 0.05
PLACES = 3
"""Texts of a row at most: anchor, positive, negative."""
_CHUNK = 1024
"""Anchors that are compared with all candidates at a time."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row's content: anchor, positive and maybe a negative."""

    where: str
    row_hash: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Paired:
    """One rendered row. `keys` are the same for the same text."""

    encoded: tuple[Encoded, ...]
    keys: tuple[int, ...]
    row_hash: str
    where: str = ""
    full_length: int = 0
    """Of its longest text."""
    task_id: int = 0

    @property
    def input_ids(self) -> list[int]:
        """The tokens of all its texts."""
        return [token for each in self.encoded for token in each.ids]

    @property
    def num_targets(self) -> int:
        """The anchor."""
        return 1

    @property
    def is_truncated(self) -> bool:
        """Whether tokens of any text were cut off."""
        return any(each.full_length > len(each.ids) for each in self.encoded)

    def outline(self) -> Outline:
        """Its texts, the anchor first."""
        return Outline(
            self.input_ids,
            [False] * len(self.input_ids),
            " and ".join(("anchor", "positive", "negative")[: len(self.encoded)]),
            prompt_len=len(self.encoded[0].ids),
        )


class Embedding(Task):
    """InfoNCE over the global batch."""

    name = "FEATURE_EXTRACTION"

    @classmethod
    def read(cls, row: SourceRow, dataset: DatasetSpec) -> Record:
        texts = [
            text_in(row, "anchor", dataset.field_anchor, dataset),
            text_in(row, "positive", dataset.field_positive, dataset),
        ]
        if dataset.field_negative or row.values.get("negative") is not None:
            present(row, "negative", dataset.field_negative or "negative", dataset)
            texts.append(text_in(row, "negative", dataset.field_negative, dataset))
        return Record(row.where, hash_of("embedding", texts), tuple(texts))

    @classmethod
    def render(cls, records: Iterable[Record], tokenizer: Any, sequence_len: int) -> Iterator[Paired]:
        for batch in chunks(records):
            encoded = iter(
                encode(tokenizer, [text for record in batch for text in record.texts], None, sequence_len)
            )
            for record in batch:
                own = tuple(next(encoded) for _ in record.texts)
                keys = tuple(int(hash_of("text", text)[:15], 16) for text in record.texts)
                longest = max(each.full_length for each in own)
                yield Paired(own, keys, record.row_hash, record.where, longest)

    def collate(self, rows: Sequence[Paired], samples: Sequence[int]) -> Batch:
        texts = [(i, place) for i, row in enumerate(rows) for place in range(len(row.encoded))]
        found = [rows[i].encoded[place] for i, place in texts]
        padded = Padded(pad_id(self.tokenizer), [each.ids for each in found], [each.types for each in found])
        owners = [rows[i] for i, _ in texts]
        return Batch(
            {**padded.inputs(), **self.task_ids(owners)},
            {
                "place": torch.tensor([place for _, place in texts]),
                "key": torch.tensor([rows[i].keys[place] for i, place in texts]),
            },
            [samples[i] * PLACES + place for i, place in texts],
            len(rows),
        )

    def silent(self, row: Paired) -> Batch:
        batch = self.collate([row], [0])
        return replace(
            batch, labels={**batch.labels, "place": batch.labels["place"] * 0 + IGNORED}, targets=0
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return pair_loss(embeddings(model, batch.inputs), batch.labels["place"], batch.labels["key"]).sum()

    def backward(self, step: Step, batches: Sequence[Batch]) -> float:
        at_once = len(batches) == 1
        made = []
        for batch in batches:
            with step.using(batch), torch.set_grad_enabled(at_once):
                made.append(embeddings(step.model, batch.inputs))
        own = torch.cat(made)
        places = torch.cat([batch.labels["place"] for batch in batches])
        keys = torch.cat([batch.labels["key"] for batch in batches])
        leaf, total = _gradient(own.detach(), places, keys, step)
        for batch, found, gradient in zip(batches, made, leaf.split([len(m) for m in made]), strict=True):
            if at_once:
                found.backward(gradient)
                continue
            with step.using(batch):
                embeddings(step.model, batch.inputs).backward(gradient)
        return total

    def answers(self, model: nn.Module, rows: Sequence[Paired], how: Answering) -> list[list[list[float]]]:
        batch = self.collate(rows, range(len(rows))).to(how.device)
        with torch.no_grad():
            found = iter(embeddings(model, batch.inputs).cpu().tolist())
        return [[next(found) for _ in row.encoded] for row in rows]

    def loss_of(self, rows: Sequence[Paired], answers: Sequence[list[list[float]]]) -> float:
        """The mean loss of an anchor, all rows together as one batch."""
        vectors, places, keys = _flat(rows, answers)
        return float(pair_loss(vectors, places, keys).double().mean())

    def metrics(
        self, rows: Sequence[Paired], answers: Sequence[list[list[float]]], names: Sequence[str]
    ) -> dict[str, float]:
        ranks = retrieval_ranks(*_flat(rows, answers)).double()
        found = {"mrr": float((1 / ranks).mean())}
        for name in names:
            if name.startswith("recall_at_"):
                found[name] = float((ranks <= int(name.rsplit("_", 1)[1])).double().mean())
        return {name: found[name] for name in names}


def embeddings(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(B, width) of length 1, float32: the mean over each sequence's own tokens."""
    mask = inputs["attention_mask"]
    hidden = own_positions(model(**inputs).last_hidden_state, mask.shape[1]).float()
    weight = mask[..., None].to(hidden)
    return F.normalize((hidden * weight).sum(dim=1) / weight.sum(dim=1), dim=-1)


def pair_loss(vectors: Tensor, places: Tensor, keys: Tensor) -> Tensor:
    """InfoNCE of each anchor, (anchors,): place 0 is an anchor, 1 its positive behind it, 2 a negative; others
    take no part."""
    is_anchor, is_candidate = places == 0, places >= 1
    if not is_anchor.any():
        return vectors.sum()[None] * 0.0
    own, hidden = _own_candidates(places, keys)
    candidates = vectors[is_candidate]
    losses = []
    for at in range(0, int(is_anchor.sum()), _CHUNK):
        scores = vectors[is_anchor][at : at + _CHUNK] @ candidates.T / TEMPERATURE
        scores = scores.masked_fill(hidden(at, at + _CHUNK), float("-inf"))
        losses.append(F.cross_entropy(scores, own[at : at + _CHUNK], reduction="none"))
    return torch.cat(losses)


def retrieval_ranks(vectors: Tensor, places: Tensor, keys: Tensor) -> Tensor:
    """From 1: the place of each anchor's own positive among all candidates, those of the same text left out; a
    candidate as near as it counts before it."""
    own, hidden = _own_candidates(places, keys)
    anchors, candidates = vectors[places == 0], vectors[places >= 1]
    ranks = []
    for at in range(0, len(anchors), _CHUNK):
        scores = anchors[at : at + _CHUNK] @ candidates.T
        mine = scores.gather(1, own[at : at + _CHUNK, None])
        others = scores.masked_fill(hidden(at, at + _CHUNK), float("-inf"))
        others = others.scatter(1, own[at : at + _CHUNK, None], float("-inf"))
        ranks.append(1 + (others >= mine).sum(dim=1))
    return torch.cat(ranks)


def _own_candidates(places: Tensor, keys: Tensor) -> tuple[Tensor, Any]:
    """(for each anchor the number of its positive among the candidates, a function of a range of anchors that says
    which candidates have the same text as it without being it)."""
    is_candidate = places >= 1
    number = torch.cumsum(is_candidate, 0) - 1
    own = number[torch.nonzero(places == 0)[:, 0] + 1]
    candidate_keys = keys[is_candidate]

    def hidden(first: int, last: int) -> Tensor:
        mine = own[first:last, None]
        same = candidate_keys[mine] == candidate_keys[None]
        return same & (torch.arange(len(candidate_keys), device=mine.device)[None] != mine)

    return own, hidden


def _gradient(own: Tensor, places: Tensor, keys: Tensor, step: Step) -> tuple[Tensor, float]:
    """(the gradient of the step's loss with respect to this rank's embeddings, its own anchors' summed loss)."""
    parts = step.group.gather_rows(own)
    everyone = torch.cat(parts).requires_grad_()
    all_places = torch.cat(step.group.gather_rows(places))
    all_keys = torch.cat(step.group.gather_rows(keys))
    losses = pair_loss(everyone, all_places, all_keys)
    (losses.sum() * step.factor).backward()
    assert everyone.grad is not None
    before = sum(len(part) for part in parts[: step.group.rank])
    anchors_before = int((all_places[:before] == 0).sum())
    mine = losses[anchors_before : anchors_before + int((places == 0).sum())]
    return everyone.grad[before : before + len(own)], float(mine.detach().sum())


def _flat(rows: Sequence[Paired], answers: Sequence[list[list[float]]]) -> tuple[Tensor, Tensor, Tensor]:
    vectors = torch.tensor([vector for answer in answers for vector in answer])
    places = torch.tensor([place for row in rows for place in range(len(row.encoded))])
    keys = torch.tensor([key for row in rows for key in row.keys])
    return vectors, places, keys
