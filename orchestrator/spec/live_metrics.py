"""What replicas measure of a version while it answers: the names that `deploy.rollout.rollback` may compare."""

from __future__ import annotations

OF_EACH: dict[str, str] = {
    "requests": "answers given so far, with those that failed",
    "error_rate": "share of them that failed",
    "latency_p50": "seconds of an answer: half take less",
    "latency_p99": "seconds that 99 of 100 answers stay below",
    "first_token_p50": "seconds to the first token: half take less",
    "first_token_p99": "seconds to the first token that 99 of 100 stay below",
    "tokens_per_second": "tokens of an answer by its seconds, over all answers",
}
"""Of the candidate; after `production.` of the version that the alias names, measured over the same time."""

OF_SHADOW: dict[str, str] = {
    "shadow.requests": "answers that were compared",
    "shadow.agreement": "share of positions where both chose the same token; of embeddings, their mean cosine",
    "shadow.logprob_diff": "mean difference of the two log-probabilities of tokens that both chose",
    "shadow.error_rate": "share of the candidate's shadow answers that failed",
}
"""Measured where `deploy.rollout.shadow_percent` is above 0."""


def live_metrics(*, shadow: bool) -> list[str]:
    """The names that a rollout measures, in the order of the tables."""
    return [*OF_EACH, *(OF_SHADOW if shadow else ()), *(f"production.{name}" for name in OF_EACH)]
