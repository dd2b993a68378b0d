"""A base and the adapters on it, run in packed rows."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from peft_dist.packed_rows import PackedRows
from peft_dist.prompts.packed import packed_embeds, packed_past

from .row_tiles import RowTiles


class PackedBase:
    """One forward after the other, by one thread at a time.

    Args:
        model: a PeftModel, in whose base each layer serves a row's adapters.
        deterministic: scores are the same to the bit, whatever else is in the row.
    """

    def __init__(self, model: Any, *, deterministic: bool) -> None:
        self.deterministic = deterministic
        self._model, self._base = model, model.get_base_model()

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._base.device  # type: ignore[no-any-return]

    def scores(self, rows: PackedRows, inputs: dict[str, Any]) -> Tensor:
        """(kept positions, vocabulary) in fp32; see `outputs`."""
        return self.outputs(rows, inputs).logits[0].float()

    def outputs(self, rows: PackedRows, inputs: dict[str, Any]) -> Any:
        """What the base gives of one packed row.

        Args:
            inputs: the base's arguments, `packed` among them; changed.
        """
        tiles = RowTiles() if self.deterministic else contextlib.nullcontext()
        with self._model.using(rows), tiles:
            embeds = packed_embeds(self._model, rows, inputs["input_ids"])
            if embeds is not None:
                del inputs["input_ids"]
                inputs["inputs_embeds"] = embeds
            inputs["packed"].past = packed_past(self._model, rows, self._base.dtype)
            return self._base(**inputs)
