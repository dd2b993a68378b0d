"""The half of a PeftModel that is about prompt methods."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_dist.contract import PromptMethod
from peft_dist.errors import AdapterError
from peft_dist.foreign_engine import trained_by_engine
from peft_dist.optim import constrain_before_update
from peft_dist.prompts.adapters import PromptAdapters
from peft_dist.prompts.base import arguments, has_decoder
from peft_dist.prompts.between import forward_between
from peft_dist.prompts.block import in_line
from peft_dist.prompts.encoder_decoder import place_in_both
from peft_dist.prompts.generation import generate
from peft_dist.prompts.labels import counted, with_loss
from peft_dist.prompts.past import filled, past
from peft_dist.prompts.placing import place
from peft_dist.prompts.rows import PromptRows
from peft_dist.ranks import on_any_rank
from peft_dist.sharding import set_whole, whole


class PromptedModel(PromptAdapters):
    """A model with a base before whose input virtual tokens may stand. `PeftModel` is the one that there is."""

    def get_prompt(
        self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None
    ) -> Any:
        """What the active prompt adapter puts before `batch_size` rows: (B, tokens, width), or a cache of keys
        and values. `max_cache_len` is HF PEFT's, and not needed."""
        rows = PromptRows(self)
        name = rows.prompt_of(None)
        if name is None:
            raise AdapterError("get_prompt: no prompt adapter is active. Call set_adapter.")
        names: list[str | None] = [name] * batch_size
        with self.base_model.reading({} if task_ids is None else {"task_ids": task_ids}):
            _, layers = past(rows, names, self.base.device)
            if layers:
                return filled(rows.base, None, layers)
            tokens = self.methods[name].embeds(rows.given(name, names), self.training)
        return tokens if tokens.ndim == 3 else tokens.repeat(batch_size, 1, 1)

    def _prompting(self) -> bool:
        return bool(self.adapters) and PromptRows(self).any()

    def _others_may_prompt(self) -> bool:
        return bool(self.adapters) and PromptRows(self).others_may_prompt()

    def _forward_prompted(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The base's forward behind virtual tokens, and the loss as the rows' methods count it."""
        rows = PromptRows(self)
        rows.reach_all()
        with self.base_model.reading(kwargs):
            inputs = {**dict(zip(arguments(rows.base), args, strict=False)), **kwargs}
            if (among := rows.current.rows) is not None and among.bins is not None:
                return forward_between(rows, inputs, among.bins)
            losses = counted(rows, inputs)
            items = inputs.pop("num_items_in_batch", None) if losses else None
            if losses:
                inputs.pop("labels")
            given, back = place_in_both(rows, inputs) if has_decoder(rows.base) else place(rows, inputs)
            with contextlib.nullcontext() if rows.positions.not_counted is None else rows.positions.counted():
                outputs = self.base_model(**given)
            outputs = outputs if back is None else in_line(outputs, *back)
            return outputs if losses is None else with_loss(outputs, *losses, items)

    def _constrain(self) -> None:
        """Brings values back to where they may be, before a forward that trains; on every rank, whatever its rows
        name."""
        constrained = {
            name: trained
            for name in self.adapters
            if type(self.methods[name]).constrain is not PromptMethod.constrain
            if (trained := {key: t for key, t in self.tensors(name).items() if t.requires_grad})
        }
        serving = self._serving_anywhere(constrained)
        for name, trained in constrained.items():
            method, tensors = self.methods[name], self.tensors(name)
            for key, tensor in trained.items():
                constrain_before_update(tensor, functools.partial(_constrain_one, method, key))
            if name not in serving:
                continue
            # On copies, since a user's own engine may keep the values elsewhere too.
            p = {key: whole(t) for key, t in tensors.items()}
            with torch.no_grad():
                method.constrain(p)
            for key, tensor in trained.items():
                set_whole(tensor, p[key])

    def _serving_anywhere(self, adapters: Mapping[str, Mapping[str, Tensor]]) -> set[str]:
        """Those of the adapters that serve now; on any rank, where an engine of a user's own has their tensors and
        ranks may name different ones: it keeps a piece of each tensor on every rank."""
        serving, rows = set(self.base_model._serving()), self._adapters.current.rows
        if rows is None or rows.adapters is None:
            return serving
        around = (self, self.base_model, self.base_model.model)
        trained = trained_by_engine(around, (t for tensors in adapters.values() for t in tensors.values()))
        return on_any_rank(serving, adapters, trained[0].device) if trained else serving

    def _generate_prompted(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        return generate(PromptRows(self), args, kwargs)


def _constrain_one(method: PromptMethod, key: str, tensor: Tensor) -> None:
    method.constrain({key: tensor})
