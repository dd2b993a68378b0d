"""Requests to token ids and back, with the base's tokenizer and the chat template that training uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.errors import ModelError

from .token_text import TokenBytes


class Prompts:
    """The tokenizer as an endpoint needs it: prompts in, text out."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.token_bytes = TokenBytes(tokenizer)
        self._longest_token = max(map(len, tokenizer.get_vocab()))

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that the tokenizer puts first."""
        ids = list(self._tokenizer(text)["input_ids"])
        if ids and ids[-1] == self._tokenizer.eos_token_id:
            ids.pop()  # some tokenizers end every text by themselves; training takes it off likewise
        if not ids and self._tokenizer.bos_token_id is not None:
            return [self._tokenizer.bos_token_id]
        return ids

    def least_tokens(self, text: str) -> int:
        """A number of tokens that a text has at least, known without reading it: spaces may count for nothing."""
        return sum(map(len, text.split())) // self._longest_token

    def chat_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins.

        Raises:
            ModelError: the template refuses this order of roles.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            raise ModelError(f"the chat template refuses these messages: {error}.") from error
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens give nothing."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class SourcePrompts(Prompts):
    """Texts that an encoder reads, as it was trained: with the tokenizer's own end."""

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens."""
        return list(self._tokenizer(text)["input_ids"])

    def chat_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of the one message that there may be.

        Raises:
            ModelError: it is a conversation.
        """
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise ModelError("this base reads one text and writes another: send one message of role user.")
        return self.text_ids(messages[0]["content"])
