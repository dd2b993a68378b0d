"""Errors as OpenAI's clients read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error in OpenAI's form.

    Args:
        status: the HTTP status.
        param: the request's key that is wrong.
        code: OpenAI's word for it, such as `model_not_found`.
        retry_after_s: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, and what a 401 must say of how to log in."""
        headers = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers


_NAMED = 20
"""Models that an error names; `/v1/models` lists them all."""


def no_such_model(model: str, why: str, there: Sequence[str]) -> ApiError:
    """A 404 that says which models there are."""
    more = f" and {len(there) - _NAMED} more (GET /v1/models)" if len(there) > _NAMED else ""
    return ApiError(
        f"The model '{model}' {why}. Here are: {', '.join(there[:_NAMED])}{more}.",
        status=404,
        param="model",
        code="model_not_found",
    )


def engine_stopped() -> ApiError:
    """What a request is told whose engine has ended: another replica, or the next one, answers."""
    return ApiError(
        "The engine has stopped; a new one is on its way. Try again.",
        status=503,
        code="engine_stopped",
        retry_after_s=2,
    )
