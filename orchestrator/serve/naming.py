"""How bases, endpoints and Serve applications are called."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..errors import ServeError
from ..identity import BaseIdentity

APPLICATION_PREFIX = "raypeft-"
"""Our applications among all on a Serve; others are never touched."""

_RESERVED = frozenset({"v1", "healthz", "-", "docs"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def base_id(base: BaseIdentity) -> str:
    """The base's own name as requests and URLs say it."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", base.name).strip("-._")[:48]
    return readable or f"base-{base.content_hash[:8]}"


_SUFFIXES = {
    "SEQ_CLS": "-classify",
    "TOKEN_CLS": "-token-classify",
    "QUESTION_ANS": "-question-answering",
    "FEATURE_EXTRACTION": "-embeddings",
}


def default_endpoint(base: BaseIdentity, taken: Collection[str], task: str = "CAUSAL_LM") -> str:
    """The endpoint's name where none was given: the base's and, where it does not generate, its task's, with a hash
    where another base has taken it."""
    name = base_id(base) + _SUFFIXES.get(task, "")
    return f"{name}-{base.content_hash[:8]}" if name in taken or name in _RESERVED else name


def check_endpoint_name(name: str) -> None:
    """Raises ServeError where a name cannot be a part of a URL."""
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise ServeError(
            f"'{name}' cannot be an endpoint's name.",
            where="deploy.endpoint",
            hint="Use at most 63 letters, digits, '.', '_' and '-', a letter or digit first; not 'v1'.",
        )


def application(endpoint: str) -> str:
    """The name of the endpoint's Serve application."""
    return APPLICATION_PREFIX + endpoint


def endpoint_of(application_name: str) -> str | None:
    """The endpoint of an application, None where it is not ours."""
    if not application_name.startswith(APPLICATION_PREFIX):
        return None
    return application_name.removeprefix(APPLICATION_PREFIX)
