"""What a replica counts of its answers, in a form that adds up over replicas."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_STEP = math.log(1.05)
_SMALLEST_S = 1e-4


class Seconds:
    """Durations, each known to within 5 %: a count for each power of 1.05."""

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self._counts = Counter(dict(counts or {}))

    def add(self, seconds: float) -> None:
        """Counts one duration."""
        self._counts[math.ceil(math.log(max(seconds, _SMALLEST_S)) / _STEP)] += 1

    def quantile(self, share: float) -> float | None:
        """Seconds that such a share of them stay at or below; None where there are none."""
        left = math.ceil(share * self._counts.total())
        for power, count in sorted(self._counts.items()):
            left -= count
            if left <= 0:
                return math.exp(power * _STEP)
        return None

    def plus(self, other: Seconds) -> Seconds:
        """Those of both."""
        return Seconds(self._counts + other._counts)

    def to_dict(self) -> dict[str, int]:
        """As it is stored."""
        return {str(power): count for power, count in sorted(self._counts.items())}

    @classmethod
    def from_dict(cls, stored: Mapping[str, int]) -> Seconds:
        """Reads what `to_dict` wrote."""
        return cls({int(power): count for power, count in stored.items()})


@dataclass
class Numbers:
    """The answers of one version."""

    requests: int = 0
    """Those that ended: answered or failed. One that the client left counts as neither."""
    errors: int = 0
    tokens: int = 0
    busy_s: float = 0.0
    """Seconds of all answers together."""
    latency: Seconds = field(default_factory=Seconds)
    first_token: Seconds = field(default_factory=Seconds)

    def count(self, seconds: float, tokens: int, first_token_s: float | None, *, failed: bool) -> None:
        """Takes one answer. A failed one says nothing of speed."""
        self.requests += 1
        self.errors += failed
        self.tokens += tokens
        if not failed:
            self.busy_s += seconds
            self.latency.add(seconds)
            if first_token_s is not None:
                self.first_token.add(first_token_s)

    def plus(self, other: Numbers) -> Numbers:
        """Those of both."""
        return Numbers(
            self.requests + other.requests,
            self.errors + other.errors,
            self.tokens + other.tokens,
            self.busy_s + other.busy_s,
            self.latency.plus(other.latency),
            self.first_token.plus(other.first_token),
        )

    def metrics(self) -> dict[str, float]:
        """By the names of `spec.live_metrics.OF_EACH`; what was not measured is left out."""
        found: dict[str, float | None] = {"requests": float(self.requests)}
        if self.requests:
            found["error_rate"] = self.errors / self.requests
        for name, seconds in (("latency", self.latency), ("first_token", self.first_token)):
            found[f"{name}_p50"], found[f"{name}_p99"] = seconds.quantile(0.5), seconds.quantile(0.99)
        if self.busy_s:
            found["tokens_per_second"] = self.tokens / self.busy_s
        return {name: value for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return {
            "requests": self.requests,
            "errors": self.errors,
            "tokens": self.tokens,
            "busy_s": round(self.busy_s, 6),
            "latency": self.latency.to_dict(),
            "first_token": self.first_token.to_dict(),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Numbers:
        """Reads what `to_dict` wrote."""
        return cls(
            stored.get("requests", 0),
            stored.get("errors", 0),
            stored.get("tokens", 0),
            stored.get("busy_s", 0.0),
            Seconds.from_dict(stored.get("latency", {})),
            Seconds.from_dict(stored.get("first_token", {})),
        )


Choices = Mapping[Hashable, float]
"""What is said of one text, each with its log-probability."""


@dataclass
class Agreement:
    """Answers of a candidate beside those of the version that clients got."""

    requests: int = 0
    errors: int = 0
    """Of the candidate's alone."""
    positions: int = 0
    agreed: float = 0
    scored: int = 0
    """Tokens that both chose after the same beginning, and choices that both made, whose log-probabilities can be
    compared."""
    difference: float = 0.0
    """Sum of the absolute differences of those, in nats."""

    def count(self, theirs: Iterable[tuple[int, float]], ours: Iterable[tuple[int, float]]) -> None:
        """Takes one pair of answers: (token, log-probability) of each position.

        A position where only one of them goes on is one at which they do not agree.
        """
        mine, other = list(theirs), list(ours)
        self.requests += 1
        self.positions += max(len(mine), len(other))
        same = True
        for (token, logprob), (its_token, its_logprob) in zip(mine, other, strict=False):
            self.agreed += token == its_token
            same = same and token == its_token
            if same:
                self.scored += 1
                self.difference += abs(logprob - its_logprob)

    def count_vectors(self, theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> None:
        """Takes one pair of answers that are vectors of length 1: two agree as far as their cosine goes."""
        self.requests += 1
        self.positions += max(len(theirs), len(ours))
        for a, b in zip(theirs, ours, strict=False):
            self.agreed += max(0.0, sum(map(operator.mul, a, b))) if len(a) == len(b) else 0.0

    def count_choices(self, theirs: Sequence[Choices], ours: Sequence[Choices]) -> None:
        """Takes one pair of answers that are labels, entities or spans of texts: those of a text agree that both have,
        wherever they stand among its others."""
        self.requests += 1
        for a, b in zip(theirs, ours, strict=True):
            both = a.keys() & b.keys()
            self.positions += max(len(a), len(b))
            self.agreed += len(both)
            self.scored += len(both)
            self.difference += sum(abs(a[choice] - b[choice]) for choice in both)

    def plus(self, other: Agreement) -> Agreement:
        """Those of both."""
        return Agreement(*(getattr(self, name) + getattr(other, name) for name in _AGREEMENT))

    def metrics(self) -> dict[str, float]:
        """By the names of `spec.live_metrics.OF_SHADOW`; what was not measured is left out."""
        asked = self.requests + self.errors
        found = {"shadow.requests": float(self.requests)}
        if asked:
            found["shadow.error_rate"] = self.errors / asked
        if self.positions:
            found["shadow.agreement"] = self.agreed / self.positions
        if self.scored:
            found["shadow.logprob_diff"] = self.difference / self.scored
        return found

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return {name: getattr(self, name) for name in _AGREEMENT}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Agreement:
        """Reads what `to_dict` wrote."""
        return cls(**{name: stored.get(name, 0) for name in _AGREEMENT})


_AGREEMENT = ("requests", "errors", "positions", "agreed", "scored", "difference")
