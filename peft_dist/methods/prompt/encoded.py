"""Virtual tokens that a network makes while they are trained: what is saved are the tokens, and a loaded adapter has
no network."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from peft_dist.contract import Params, PromptMethod, Site

if TYPE_CHECKING:
    from torch import Tensor


class EncodedPrompt(PromptMethod):
    """A prompt method whose `embeds` are what is saved, as `prompt_embeddings`, and whose `params` of
    `inference_mode` are these alone."""

    def export(self, p: Params, site: Site) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.embeds(p)}

    def saved_form(self) -> PromptMethod:
        bare: Any = copy.copy(self)
        bare.inference_mode = True
        return bare
