"""Prompt tuning: n learned embeddings before the input.

Lester et al. 2021, arXiv:2104.08691.
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
    without_effect: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "PROMPT_TUNING"
        if not isinstance(self.num_virtual_tokens, int) or self.num_virtual_tokens < 1:
            raise ConfigError(
                f"PromptTuningConfig.num_virtual_tokens: {self.num_virtual_tokens!r}; it is a whole "
                "number of at least 1."
            )
        try:
            self.prompt_tuning_init = PromptTuningInit(self.prompt_tuning_init)
        except ValueError:
            raise ConfigError(
                f"PromptTuningConfig.prompt_tuning_init: {self.prompt_tuning_init!r} is not one of "
                f"{', '.join(PromptTuningInit.__members__)}."
            ) from None
        if self.prompt_tuning_init is PromptTuningInit.TEXT:
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise ConfigError(
                        f"PromptTuningConfig.{name}: must be given when prompt_tuning_init is TEXT."
                    )
        if self.tokenizer_kwargs and self.prompt_tuning_init is not PromptTuningInit.TEXT:
            raise ConfigError(
                "PromptTuningConfig.tokenizer_kwargs: only used when prompt_tuning_init is TEXT."
            )

    @property
    def num_tokens(self) -> int:
        assert self.num_virtual_tokens is not None
        return self.num_virtual_tokens

    def params(self, site: Site) -> dict[str, Param]:
        shape = (self.num_tokens, site.out)
        key = "prompt_encoder.embedding.weight"
        return {"embeddings": Param(key, ("tokens", "out"), shape, starts.normal, saved="prompt_embeddings")}

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        if self.prompt_tuning_init is PromptTuningInit.RANDOM:
            return
        table = base.weight().T
        if self.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, table.shape[0], (self.num_virtual_tokens,))
        else:
            ids = torch.tensor(self._text_ids())
        p["embeddings"].copy_(table[ids.to(table.device)])

    def _text_ids(self) -> list[int]:
        # A checkpoint's config must not be able to run code from a hub.
        arguments = {
            key: value for key, value in (self.tokenizer_kwargs or {}).items() if key != "trust_remote_code"
        }
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.tokenizer_name_or_path, **arguments)
        ids = tokenizer(self.prompt_tuning_init_text)["input_ids"]
        if not ids:
            raise ConfigError("PromptTuningConfig.prompt_tuning_init_text: has no tokens.")
        return (ids * -(-self.num_tokens // len(ids)))[: self.num_tokens]

    def embeds(self, p: Params) -> Tensor:
        return p["embeddings"]
