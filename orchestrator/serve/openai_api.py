"""The OpenAI HTTP API as data: what requests may say, what answers and errors look like. No transport."""

from __future__ import annotations

import re
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import closest
from .engine import FinishReason

_IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity",
})  # fmt: skip
"""Keys of OpenAI's own that change nothing in the answer's text."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
}
"""Keys that we do not serve, with the values that ask for nothing."""


class ApiError(Exception):
    """An error in OpenAI's form.

    Args:
        status: the HTTP status.
        param: the request's key that is wrong.
        code: OpenAI's word for it, such as `model_not_found`.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


def _same(value: Any, neutral: Any) -> bool:
    """Equal, with 0 and False kept apart: `logprobs: 0` asks for something, `logprobs: false` does not."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


class StreamOptions(_Strict):
    """`include_usage`: a last chunk with the counts."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class _Request(_Strict):
    """What completions and chat completions share."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("the body must be a JSON object")
        kept = {}
        for key, value in data.items():
            if key in cls.model_fields:
                kept[key] = value
            elif key in _NEUTRAL:
                if not any(_same(value, neutral) for neutral in _NEUTRAL[key]):
                    raise ValueError(f"'{key}' is not supported here; leave it out")
            elif key not in _IGNORED:
                near = closest(key, cls.model_fields)
                raise ValueError(f"unknown key '{key}'" + (f"; closest: '{near[0]}'" if near else ""))
        return kept

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; empty ones stop nothing."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=64)]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = 16

    @property
    def token_limit(self) -> int:
        """Tokens of the answer; OpenAI's default of 16."""
        return self.max_tokens or 16

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]


class TextPart(_Strict):
    """A part of a message; only text can be served."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def token_limit(self) -> int | None:
        """Tokens of the answer; None: what the context leaves."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


def parse(kind: type[_Request], body: bytes) -> Any:
    """The request that a body holds.

    Raises:
        ApiError: 400 with the key that is wrong.
    """
    try:
        return kind.model_validate_json(body or b"")
    except ValidationError as error:
        raise _bad_request(error) from error


_UNION_TAG = re.compile(r"str|list\[.*|constrained-.*|function-.*")
"""What pydantic puts into a place to say which member of a union it tried."""


def _bad_request(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(f"The body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}.")
    first_key, *rest = (str(part) for part in first["loc"] or ("",))
    where = ".".join([first_key, *(part for part in rest if not _UNION_TAG.fullmatch(part))])
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return ApiError(f"You must provide '{where}'.", param=where, code="missing_required_parameter")
    message = f"Invalid '{where}': {said}." if where else f"{said[0].upper()}{said[1:]}."
    return ApiError(message, param=where or None, code="invalid_value")


class Usage(BaseModel):
    """Token counts of one request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        """With the sum."""
        return {**self.model_dump(), "total_tokens": self.prompt_tokens + self.completion_tokens}


class Reply:
    """Builds the objects that answer one request: whole, or chunk by chunk."""

    def __init__(self, *, chat: bool, model: str) -> None:
        self._chat, self._model = chat, model
        self._id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    def whole(self, choices: list[tuple[str, FinishReason]], usage: Usage) -> dict[str, Any]:
        """The answer in one object; `choices` are texts with what ended them."""
        return {
            **self._head(chunk=False),
            "choices": [self._choice(at, text, reason) for at, (text, reason) in enumerate(choices)],
            "usage": usage.to_dict(),
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that names the role, as chat streams begin; None for completions."""
        if not self._chat:
            return None
        return self._chunk(
            [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
        )

    def piece(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """A chunk with some text, or with what ended it."""
        if not self._chat:
            return self._chunk([{"index": index, "text": text, "logprobs": None, "finish_reason": reason}])
        delta = {"content": text} if text else {}
        return self._chunk([{"index": index, "delta": delta, "finish_reason": reason}])

    def counts(self, usage: Usage) -> dict[str, Any]:
        """The last chunk where usage was asked for."""
        return {**self._chunk([]), "usage": usage.to_dict()}

    def _choice(self, index: int, text: str, reason: FinishReason) -> dict[str, Any]:
        if self._chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head(chunk=True), "choices": choices}

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}


def model_card(
    name: str, *, created: int, parent: str | None = None, root: str | None = None
) -> dict[str, Any]:
    """One row of /v1/models; an adapter's parent is its base, an alias's root the version it names."""
    card = {"id": name, "object": "model", "created": created, "owned_by": "raypeft"}
    return card | ({"parent": parent} if parent else {}) | ({"root": root} if root else {})
