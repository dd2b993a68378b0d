"""Questions to an endpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from .. import ask as asking
from ..cluster import load_cluster
from ..errors import ServeError
from ..keys import KeyBook
from ..registry import Registry
from .found import registry_of
from .served import endpoints


def ask(
    model: str,
    question: str,
    *,
    max_tokens: int = 128,
    context: str | None = None,
    task_id: int | None = None,
    url: str | None = None,
    cluster: str | None = None,
) -> str:
    """An adapter's, or a bare base's, answer to one question; of labels, entities, spans and vectors, in words. Its key
    is RAYPEFT_API_KEY, or one lent by the registry.

    Args:
        context: the text that answers the question, or the second of two texts, where the endpoint reads such.
        task_id: which is meant of the tasks that an adapter learned.
    """
    there, key = place_to_ask(model, url, cluster)
    asked: dict[str, Any] = {"key": key, "context": context, "task_id": task_id}
    return asking.ask(there, model, question, max_tokens=max_tokens, **asked)


def ask_head(
    model: str,
    question: str,
    *,
    context: str | None = None,
    task_id: int | None = None,
    url: str | None = None,
    cluster: str | None = None,
) -> dict[str, Any] | None:
    """The same of an endpoint that does not generate: its labels, entities, spans or vector; else None."""
    there, key = place_to_ask(model, url, cluster)
    return asking.ask_head(there, model, question, key=key, context=context, task_id=task_id)


def ask_stream(
    model: str,
    question: str,
    *,
    max_tokens: int = 128,
    context: str | None = None,
    task_id: int | None = None,
    url: str | None = None,
    cluster: str | None = None,
) -> Iterator[str]:
    """Likewise, piece by piece as it is generated."""
    there, key = place_to_ask(model, url, cluster)
    asked: dict[str, Any] = {"key": key, "context": context, "task_id": task_id}
    return asking.ask_stream(there, model, question, max_tokens=max_tokens, **asked)


def place_to_ask(model: str, url: str | None, cluster: str | None) -> tuple[str, str | None]:
    """An endpoint's URL and a key for one question: one that was named by its URL may follow another registry."""
    if url:
        return url, os.environ.get("RAYPEFT_API_KEY")
    return _url_of(model, cluster), key_of(registry_of(cluster))


def key_of(registry: Registry) -> str | None:
    """The key to ask a registry's endpoints with: the environment's, or, where keys are asked for, a short-lived one:
    who writes the registry may ask what it serves."""
    if said := os.environ.get("RAYPEFT_API_KEY"):
        return said
    book = KeyBook(registry.url)
    return None if book.read().is_empty else book.lend()


def _url_of(model: str, cluster: str | None) -> str:
    """The endpoint that answers to `model`."""
    where = load_cluster(cluster)
    rows = [row for row in endpoints(cluster=cluster) if row.state == "live"]
    if not rows:
        raise ServeError("no endpoint is up.", where=where.registry, hint="Start one: raypeft deploy NAME@V")
    if len(rows) == 1:
        return rows[0].url
    name = model.partition("@")[0]
    for row in rows:
        if model in (row.name, row.base) or any(
            adapter.partition("@")[0] == name for adapter in row.adapters
        ):
            return row.url
    raise ServeError(
        f"none of the {len(rows)} endpoints serves '{model}'.",
        hint=f"They serve: {', '.join(adapter for row in rows for adapter in (row.base, *row.adapters))}.",
    )
