"""Prompt tuning: n learned embeddings before the input.

Lester et al. 2021, arXiv:2104.08691. On a base with an encoder and a decoder HF PEFT makes n for each, and uses
the encoder's alone.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.config import PromptLearningConfig
from peft_dist.contract import BaseLayer, Param, Params, PromptMethod, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")
transformers = lazy("transformers")


class PromptTuningInit(enum.StrEnum):
    """Where the embeddings start."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"


@dataclass
class PromptTuningConfig(PromptLearningConfig, PromptMethod):
    """HF PEFT's PromptTuningConfig.

    Args:
        prompt_tuning_init: RANDOM: normal; SAMPLE_VOCAB: embeddings of tokens drawn from the vocabulary;
            TEXT: those of `prompt_tuning_init_text`, repeated or cut to length.
        prompt_tuning_init_text: the text of TEXT.
        tokenizer_name_or_path: the tokenizer of TEXT. tokenizer_kwargs: its arguments.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    prefix: ClassVar[str] = "prompt_"
    starts_from: ClassVar[type[enum.StrEnum]] = PromptTuningInit

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "PROMPT_TUNING"
        where = type(self).__name__
        try:
            self.prompt_tuning_init = self.starts_from(self.prompt_tuning_init)
        except ValueError:
            raise ConfigError(
                f"{where}.prompt_tuning_init: {self.prompt_tuning_init!r} is not one of "
                f"{', '.join(self.starts_from.__members__)}."
            ) from None
        if self.prompt_tuning_init == "TEXT":
            if not self.tokenizer_name_or_path:
                raise ConfigError(
                    f"{where}.tokenizer_name_or_path: must be given when prompt_tuning_init is TEXT."
                )
            if self.prompt_tuning_init_text is None:
                raise ConfigError(
                    f"{where}.prompt_tuning_init_text: must be given when prompt_tuning_init is TEXT."
                )
        elif self.tokenizer_kwargs:
            raise ConfigError(f"{where}.tokenizer_kwargs: only used when prompt_tuning_init is TEXT.")

    def params(self, site: Site) -> dict[str, Param]:
        shape, key = (self.total_tokens, site.out), "prompt_encoder.embedding.weight"
        return {"embeddings": Param(key, ("tokens", "out"), shape, starts.normal, saved="prompt_embeddings")}

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, base.site.in_, (self.total_tokens,))
        elif self.prompt_tuning_init == "TEXT":
            ids = torch.tensor(self._text_ids())
        else:
            return
        p["embeddings"].copy_(of_vocabulary(base, ids))

    def _text_ids(self) -> list[int]:
        # A checkpoint's config must not be able to run code from a hub.
        arguments = {
            key: value for key, value in (self.tokenizer_kwargs or {}).items() if key != "trust_remote_code"
        }
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.tokenizer_name_or_path, **arguments)
        ids = tokenizer(self.prompt_tuning_init_text)["input_ids"]
        if not ids:
            raise ConfigError(f"{type(self).__name__}.prompt_tuning_init_text: has no tokens.")
        return (ids * -(-self.total_tokens // len(ids)))[: self.total_tokens]

    def embeds(self, p: Params, training: bool = False) -> Tensor:
        return p["embeddings"]


def of_vocabulary(base: BaseLayer, ids: Tensor) -> Tensor:
    """What the input embeddings give for `ids` (tokens,): (tokens, width)."""
    W = base.weight()
    return base.apply(W, ids.to(W.device))
