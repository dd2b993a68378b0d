"""The base's generate behind virtual tokens: each step gets its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peft_dist.errors import ConfigError
from peft_dist.prompts.base import has_decoder, num_rows
from peft_dist.prompts.encoder_decoder import continue_decoder, place_in_decoder, place_in_encoder
from peft_dist.prompts.placing import place
from peft_dist.prompts.rows import PromptRows


def generate(rows: PromptRows, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The base's generate behind virtual tokens: each step's arguments are changed on their way."""
    base, served = rows.base, rows.current.rows
    expansion = rows_each(rows.base, kwargs)
    if has_decoder(rows.base):
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
            args = ()
        if expansion > 1 and rows.choose():
            raise ConfigError(
                "generate: num_beams and num_return_sequences above 1 cannot be used with adapter_names on an "
                "encoder-decoder base. Name one adapter at a time."
            )
        kwargs = _encoders_inputs(rows, kwargs)
    with contextlib.ExitStack() as within:
        if served is not None and served.adapters is not None and expansion > 1:
            expanded = tuple(name for name in served.adapters for _ in range(expansion))
            within.enter_context(rows.model.using(dataclasses.replace(served, adapters=expanded)))  # type: ignore[operator]
        within.enter_context(_steps_changed(rows, expansion))
        if has_decoder(rows.base):
            within.enter_context(rows.positions.counted())
        return base.generate(*args, **kwargs)


def rows_each(base: Any, kwargs: dict[str, Any]) -> int:
    """How many rows `generate` makes of each it is given: beams, or sequences to return."""
    settings = kwargs.get("generation_config") or base.generation_config
    wanted = [kwargs.get(n) or getattr(settings, n, None) or 1 for n in ("num_beams", "num_return_sequences")]
    return max(wanted)


def _encoders_inputs(rows: PromptRows, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of generate with the encoder's virtual tokens."""
    kwargs = dict(kwargs)
    if kwargs.get("inputs") is not None:
        kwargs["input_ids"] = kwargs.pop("inputs")
    names = rows.names(num_rows(kwargs))
    ids = kwargs.get("input_ids")
    if kwargs.get("attention_mask") is None and ids is not None:
        kwargs["attention_mask"] = _shown(rows.base, ids, kwargs)
    place_in_encoder(rows, names, kwargs)
    return kwargs


def _shown(base: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The attention mask that generate infers where none is given: padding is hidden unless it ends
    texts too."""
    settings = kwargs.get("generation_config") or base.generation_config
    pad = kwargs.get("pad_token_id", settings.pad_token_id)
    ends = kwargs.get("eos_token_id", settings.eos_token_id)
    if pad is None or pad in (ends if isinstance(ends, (list, tuple)) else [ends]):
        return torch.ones_like(input_ids)
    return input_ids.ne(pad).long()


@contextlib.contextmanager
def _steps_changed(rows: PromptRows, rows_of_each: int) -> Iterator[None]:
    """Within the context each step of the base's generate gets its virtual tokens."""
    base: Any = rows.base
    original = base.prepare_inputs_for_generation

    @functools.wraps(original)
    def prepare(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = original(*args, **kwargs)
        past = inputs.get("past_key_values")
        # Without a cache every step is a first one; what a prefix filled would be taken for its past.
        if inputs.get("use_cache") is False:
            inputs.pop("past_key_values", None)
            past = None
        if getattr(past, "is_compileable", False):
            raise ConfigError(
                "generate: a prompt adapter needs a cache that grows. Leave cache_implementation out."
            )
        if not has_decoder(rows.base):
            return place(rows, inputs)[0]
        names = rows.names(num_rows(inputs))
        if past is not None and past.get_seq_length():
            return continue_decoder(rows, names, inputs)
        return place_in_decoder(rows, names, inputs, steps=True)[0]

    base.prepare_inputs_for_generation = prepare
    rows.rows_of_each = rows_of_each
    try:
        yield
    finally:
        rows.rows_of_each = 1
        del base.prepare_inputs_for_generation
