"""Rows of an embedding that are trained beside an adapter: `trainable_token_indices`. The method is TRAINABLE_TOKENS,
under the names that HF PEFT gives its tensors there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peft_dist.contract import Param, Params, Site
from peft_dist.methods.replace.trainable_tokens import SameRows, TokenRows

if TYPE_CHECKING:
    from torch import Tensor

SAVED = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class RowsBeside(TokenRows):
    """The rows `token_indices`.

    Args:
        ties: whether the same vectors replace the rows of layers that share the embedding's weight.
    """

    token_indices: Sequence[int]
    ties: bool = True
    init_weights: bool = True

    prefix: ClassVar[str] = "token_adapter."
    is_beside: ClassVar[bool] = True

    def tied(self, site: Site) -> TokenRows | None:
        return SameRowsBeside(self.token_indices) if self.ties else None

    def params(self, site: Site) -> dict[str, Param]:
        wanted = super().params(site)
        return {**wanted, "rows": dataclasses.replace(wanted["rows"], saved=SAVED)}

    def export(self, p: Params, site: Site) -> dict[str, Tensor]:
        return {SAVED: p["rows"]}


@dataclass(frozen=True)
class SameRowsBeside(SameRows):
    """The same on a layer that shares the embedding's weight; in a file they are the embedding's alone."""

    peft_type: ClassVar[str | None] = None
    prefix: ClassVar[str] = "token_adapter."
    is_beside: ClassVar[bool] = True

    def export(self, p: Params, site: Site) -> dict[str, Tensor]:
        return {}

    def restore(self, saved: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        return {}
