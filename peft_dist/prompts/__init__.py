"""Virtual tokens: which prompt adapters serve which rows of a batch, and what the base then gets.

Rows may have different numbers of virtual tokens. What the base gives is put back in line: a row's own positions
are the last ones.
"""

from peft_dist.prompts.model import PromptedModel

__all__ = ["PromptedModel"]
