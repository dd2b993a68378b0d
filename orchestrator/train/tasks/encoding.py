"""Texts, alone or in pairs, as the tokens that an encoder or a classifier reads: with the tokenizer's own special
tokens, cut so that these stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ModelError

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One text or pair."""

    ids: list[int]
    types: list[int] | None
    """`token_type_ids`, where the tokenizer tells the two texts of a pair apart."""
    full_length: int
    """Tokens before it was cut."""


def encode(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, sequence_len: int
) -> list[Encoded]:
    """Each text, with its pair where given, in at most `sequence_len` tokens; of a pair the longer text is cut
    first."""
    beside = () if pairs is None else (list(pairs),)
    found = tokenizer(list(texts), *beside, verbose=False)
    types = found.get("token_type_ids") or [None] * len(texts)
    whole = [Encoded(ids, kinds, len(ids)) for ids, kinds in zip(found["input_ids"], types, strict=True)]
    return [
        each if each.full_length <= sequence_len else _cut(tokenizer, i, texts, pairs, sequence_len, each)
        for i, each in enumerate(whole)
    ]


def _cut(
    tokenizer: Any, i: int, texts: Sequence[str], pairs: Sequence[str] | None, limit: int, whole: Encoded
) -> Encoded:
    beside = () if pairs is None else (pairs[i],)
    found = tokenizer(texts[i], *beside, truncation="longest_first", max_length=limit, verbose=False)
    return Encoded(found["input_ids"], found.get("token_type_ids"), whole.full_length)


def check_offsets(tokenizer: Any, what: str) -> None:
    """Raises ModelError for a tokenizer that cannot say which characters a token stands for."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"the base's tokenizer ({type(tokenizer).__name__}) does not say where in the text a token stands, "
            f"which {what} needs.",
            where="model.base_model",
            hint="Use a base with a fast tokenizer (tokenizer.json).",
        )


def own_positions(tensor: Any, length: int) -> Any:
    """The last `length` positions of (B, P + length, ...): without the virtual tokens of a prompt method."""
    return tensor[:, -length:]
