"""What a head's values say: labels, entities and answers, as training and its metrics read them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.train.tasks.qa import Window
from orchestrator.train.tasks.token_classification import OUTSIDE, first_tokens

from .heads import Entity, Span

LONGEST_ANSWER = 128
"""Tokens of a span."""
_WORD = re.compile(r"\S+")


def classes(logits: Tensor, labels: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """(labels,) -> every label with its probability, likeliest first; one label alone is there or not."""
    shares = logits.sigmoid() if len(labels) == 1 else logits.softmax(-1)
    order = shares.argsort(descending=True, stable=True).tolist()
    return tuple((labels[number], float(shares[number])) for number in order)


@dataclass(frozen=True)
class Words:
    """The words of a text, which blanks separate, as the tokenizer is given them: with one blank between two.

    `places[i]` are the first character of word i in the text and the one after its last.
    """

    places: tuple[tuple[int, int], ...]
    joined: str
    texts: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Words:
        """Those of a text."""
        found = list(_WORD.finditer(text))
        texts = tuple(match.group() for match in found)
        return cls(tuple(match.span() for match in found), " ".join(texts), texts)

    def firsts(self, offsets: Sequence[tuple[int, int]]) -> list[int | None]:
        """For each word the token that is asked for its label, as in training."""
        return first_tokens(self.texts, offsets)


def entities(
    logits: Tensor, labels: Sequence[str], firsts: Sequence[int | None], words: Words
) -> tuple[Entity, ...]:
    """(tokens, labels) -> the stretches of words of one kind: B- begins one, I- of its kind goes on with it; labels
    without B- and I- go on with a neighbour of the same label. A stretch's probability is the mean of its words'."""
    if not any(first is not None for first in firsts):
        return ()
    shares = logits.softmax(-1)
    chosen = shares.argmax(-1).tolist()
    tagged = (
        (OUTSIDE, 0.0) if first is None else (labels[chosen[first]], float(shares[first, chosen[first]]))
        for first in firsts
    )
    return tuple(_stretches(list(tagged), words.places))


def _stretches(tagged: Sequence[tuple[str, float]], places: Sequence[tuple[int, int]]) -> Iterator[Entity]:
    kind, begin, end, scores = "", 0, 0, list[float]()
    for (tag, score), (first, last) in zip(tagged, places, strict=True):
        mark, _, rest = tag.partition("-")
        own, opens = (rest, mark == "B") if mark in ("B", "I") and rest else (tag, False)
        if scores and (own != kind or opens):
            yield Entity(kind, sum(scores) / len(scores), begin, end)
            scores = []
        if own == OUTSIDE:
            kind = ""
            continue
        if not scores:
            kind, begin = own, first
        end = last
        scores.append(score)
    if scores:
        yield Entity(kind, sum(scores) / len(scores), begin, end)


def spans(
    windows: Sequence[Window],
    values: Sequence[tuple[Tensor, Tensor]],
    context: str,
    top: int,
    *,
    may_be_empty: bool,
    longest: int = LONGEST_ANSWER,
) -> tuple[Span, ...]:
    """The likeliest answers over all windows of a context, best first, each stretch of the text once.

    A span's value is the sum of its ends' values; its probability that value's share of all spans', and of that of
    no answer, the least of the windows' null tokens', where the adapter knows such questions.

    Args:
        values: for each window the values of its tokens as first and as last, (tokens,) each.
    """
    tables = [_table(window, *own, longest) for window, own in zip(windows, values, strict=True)]
    total = torch.stack([table.logsumexp((0, 1)) for table in tables]).logsumexp(0)
    nothing = min(
        float(first[window.null] + last[window.null])
        for window, (first, last) in zip(windows, values, strict=True)
    )
    if may_be_empty:
        total = torch.logaddexp(total, torch.tensor(nothing))
    best: dict[tuple[int, int], float] = {(0, 0): nothing} if may_be_empty else {}
    for window, table in zip(windows, tables, strict=True):
        length = len(window.ids)
        found = table.flatten().topk(min(4 * top, length * length))
        for value, place in zip(found.values.tolist(), found.indices.tolist(), strict=True):
            stretch = _stretch(window, place // length, place % length, context)
            if stretch is not None and value > best.get(stretch, float("-inf")):
                best[stretch] = value
    ranked = sorted(best.items(), key=lambda item: -item[1])[:top]
    return tuple(Span(*stretch, float((torch.tensor(value) - total).exp())) for stretch, value in ranked)


def _table(window: Window, first: Tensor, last: Tensor, longest: int) -> Tensor:
    """(tokens, tokens): the value of each span from its first token (rows) to its last; -inf where there is none."""
    length = len(window.ids)
    in_context = torch.tensor([span is not None for span in window.spans])
    allowed = in_context[:, None] & in_context[None, :]
    allowed &= torch.ones(length, length, dtype=torch.bool).triu().tril(longest - 1)
    allowed[window.null, window.null] = False
    return (first[:, None] + last[None, :]).masked_fill(~allowed, float("-inf"))


def _stretch(window: Window, first: int, last: int, context: str) -> tuple[int, int] | None:
    """The characters of a span without blanks around them; None where nothing is left or it is not of the text."""
    opening, closing = window.spans[first], window.spans[last]
    if opening is None or closing is None:
        return None
    text = context[opening[0] : closing[1]]
    begin = opening[0] + len(text) - len(text.lstrip())
    end = closing[1] - (len(text) - len(text.rstrip()))
    return (begin, end) if begin < end else None
