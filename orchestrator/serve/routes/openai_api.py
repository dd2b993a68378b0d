"""What requests may say, in OpenAI's words. No transport."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orchestrator.errors import closest

from ..api_error import ApiError

_IGNORED = frozenset({
    "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity",
})  # fmt: skip
"""Keys of OpenAI's own that change nothing in the answer's text."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "dimensions": (None,),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "web_search_options": (None,),
}
"""Keys that we do not serve, with the values that ask for nothing."""


MAX_SEQUENCES = 128
"""Prompts times choices of one request."""
MOST_LIKELY = 20
"""The most tokens that log-probabilities are shown of, beside the one that was taken."""


class Strict(BaseModel):
    """Part of a request: of the types it says, with no key that it does not say."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


def _same(value: Any, neutral: Any) -> bool:
    """Equal, with 0 and False kept apart: `logprobs: 0` asks for something, `logprobs: false` does not."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


StopString = Annotated[str, Field(max_length=256)]


class StreamOptions(Strict):
    """`include_usage`: a last chunk with the counts."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Ask(Strict):
    """What every request says: which model; keys that change no answer are passed over, others are refused."""

    model: Annotated[str, Field(max_length=512)]
    user: str | None = None
    task_id: Annotated[int, Field(ge=0)] | None = None
    """The task of an adapter that learned several; no key of OpenAI's own."""

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
                    message = f"'{key}' is not supported here; leave it out."
                    raise ApiError(message, param=key, code="unsupported_parameter")
            elif key not in _IGNORED:
                near = closest(key, cls.model_fields)
                message = f"Unknown key '{key[:80]}'" + (f"; closest: '{near[0]}'." if near else ".")
                raise ApiError(message, param=key[:80], code="unknown_parameter")
        return kept


class _Request(Ask):
    """What completions and chat completions share."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError("'stream_options' says how to stream; set stream: true.", param="stream_options")
        return self

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
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _false_is_none(cls, data: Any) -> Any:
        """Clients of the chat API say false here."""
        return (
            {**data, "logprobs": None} if isinstance(data, dict) and data.get("logprobs") is False else data
        )

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        if len(self.prompts) * (self.n or 1) > MAX_SEQUENCES:
            raise ValueError(f"prompts times n is more than {MAX_SEQUENCES}")
        return self

    @property
    def top(self) -> int | None:
        """How many tokens log-probabilities are asked of; None: of none."""
        return self.logprobs

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


class TextPart(Strict):
    """A part of a message; only text can be served."""

    type: Literal["text"]
    text: str


_OF_ANSWERS = frozenset({"annotations", "audio", "function_call", "refusal", "tool_call_id", "tool_calls"})
"""Keys that a message has which was an answer; empty ones say nothing."""


class Message(BaseModel):
    """One turn of a conversation; an answer's own message, as clients put it among the next ones, is taken as it is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _said(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            key: value for key, value in data.items() if key not in _OF_ANSWERS or value not in (None, [])
        }

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
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        return self

    @property
    def top(self) -> int | None:
        """How many tokens log-probabilities are asked of; None: of none."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        """Tokens of the answer; None: what the context leaves."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


Kind = TypeVar("Kind", bound=Ask)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """The request that a body holds.

    Raises:
        ApiError: 400 with the key that is wrong.
    """
    try:
        return kind.model_validate_json(body or b"")
    except ValidationError as error:
        raise _bad_request(error) from error
    except (RecursionError, UnicodeEncodeError) as error:
        raise ApiError(f"The body cannot be read: {error}.") from error


_UNION_TAG = re.compile(r"str|list\[.*|constrained-.*|function-.*|Pair")
"""What pydantic puts into a place to say which member of a union it tried."""


def _most_telling(errors: Sequence[Any]) -> Any:
    """Of what is wrong with the first key: each member of a union says that the value is not its own, and the one that
    was meant says what is wrong with it, or finds a part that is."""
    same = [each for each in errors if each["loc"][:1] == errors[0]["loc"][:1]]
    return min(same, key=lambda each: (each["type"].endswith("_type"), -len(each["loc"])))


def _bad_request(error: ValidationError) -> ApiError:
    first = _most_telling(error.errors(include_url=False, include_input=False, include_context=False))
    if first["type"] == "json_invalid":
        return ApiError(f"The body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}.")
    first_key, *rest = (str(part) for part in first["loc"] or ("",))
    where = ".".join([first_key, *(part for part in rest if not _UNION_TAG.fullmatch(part))])
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return ApiError(f"You must provide '{where}'.", param=where, code="missing_required_parameter")
    message = f"Invalid '{where}': {said}." if where else f"{said[0].upper()}{said[1:]}."
    return ApiError(message, param=where or None, code="invalid_value")
