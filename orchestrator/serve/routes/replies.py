"""What answers to completions look like, whole and chunk by chunk, in OpenAI's two forms."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engines.engine import FinishReason, TokenLogprob
from ..engines.token_text import Characters, TakenTokens, readable

TokenBytes = Callable[[int], bytes]


@dataclass
class Usage:
    """Token counts of one request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        """With the sum."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass
class Choice:
    """One answer as far as it has come."""

    index: int
    text: list[str] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None


class Reply:
    """Builds the objects that answer one request.

    Args:
        chat: whether chat completions asked.
        model: what answers.
        fingerprint: of all that decides an answer beside the request.
        token_bytes: given where log-probabilities were asked for.
        include_usage: whether chunks have a `usage`, null in all but the last.
    """

    def __init__(
        self,
        *,
        chat: bool,
        model: str,
        fingerprint: str,
        token_bytes: TokenBytes | None = None,
        include_usage: bool = False,
    ) -> None:
        self._chat, self._token_bytes = chat, token_bytes
        head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._whole_head = {**head, "object": "chat.completion" if chat else "text_completion"}
        self._chunk_head = {**head, "object": "chat.completion.chunk" if chat else "text_completion"}
        self.include_usage = include_usage
        self._characters: defaultdict[int, Characters] = defaultdict(Characters)

    @property
    def wants_tokens(self) -> bool:
        """Whether log-probabilities are shown."""
        return self._token_bytes is not None

    def taken(self) -> TakenTokens | None:
        """What keeps one choice's tokens in step with its text; None where no tokens are shown."""
        return TakenTokens(self._token_bytes) if self._token_bytes else None

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answer in one object."""
        return {
            **self._whole_head,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage.to_dict(),
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that names the role, as chat streams begin; None for completions."""
        if not self._chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def piece(
        self, index: int, text: str, reason: FinishReason | None, tokens: Sequence[TokenLogprob] = ()
    ) -> dict[str, Any]:
        """A chunk with some text, or with what ended it."""
        shown = self._logprobs(index, tokens) if tokens else None
        if not self._chat:
            return self._chunk([{"index": index, "text": text, "logprobs": shown, "finish_reason": reason}])
        delta = {"content": text} if text else {}
        return self._chunk([{"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason}])

    def counts(self, usage: Usage) -> dict[str, Any]:
        """The last chunk where usage was asked for."""
        return {**self._chunk([]), "usage": usage.to_dict()}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        shown = self._logprobs(choice.index, choice.tokens) if self.wants_tokens else None
        common = {"index": choice.index, "logprobs": shown, "finish_reason": choice.reason}
        if self._chat:
            return {**common, "message": {"role": "assistant", "content": text, "refusal": None}}
        return {**common, "text": text}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._chunk_head, "choices": choices}
        return {**chunk, "usage": None} if self.include_usage else chunk

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        assert self._token_bytes is not None
        if self._chat:
            return {"content": [self._chat_token(token) for token in tokens], "refusal": None}
        return {
            "tokens": [readable(self._token_bytes(token.token)) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {readable(self._token_bytes(other)): logprob for other, logprob in token.top}
                for token in tokens
            ],
            "text_offset": [
                self._characters[index].begin(self._token_bytes(token.token)) for token in tokens
            ],
        }

    def _chat_token(self, token: TokenLogprob) -> dict[str, Any]:
        tops = [self._chat_entry(other, logprob) for other, logprob in token.top]
        return {**self._chat_entry(token.token, token.logprob), "top_logprobs": tops}

    def _chat_entry(self, token: int, logprob: float) -> dict[str, Any]:
        assert self._token_bytes is not None
        data = self._token_bytes(token)
        return {"token": readable(data), "logprob": logprob, "bytes": list(data)}


def model_card(
    name: str,
    *,
    created: int,
    parent: str | None = None,
    root: str | None = None,
    version: int | None = None,
    method: str | None = None,
    state: str | None = None,
) -> dict[str, Any]:
    """One row of /v1/models; an adapter's parent is its base, an alias's root the version it names."""
    card = {"id": name, "object": "model", "created": created, "owned_by": "raypeft"}
    said = {"parent": parent, "root": root, "version": version, "method": method, "state": state}
    return card | {key: value for key, value in said.items() if value is not None}
