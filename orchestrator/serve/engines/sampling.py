"""The next token of one sequence, as transformers' `generate` would choose it from the same scores."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from .engine import Generation, TokenLogprob


def generation_config(model: Any, request: Generation, eos_ids: frozenset[int]) -> GenerationConfig:
    """The base's own defaults (a repetition penalty, its end tokens) with what the request says."""
    config = copy.deepcopy(model.generation_config)
    config.update(
        max_new_tokens=request.max_tokens,
        max_length=None,
        do_sample=request.draws,
        temperature=request.temperature if request.draws else None,
        top_p=request.top_p if request.draws else None,
        top_k=0 if request.draws else None,
        eos_token_id=sorted(eos_ids) or None,
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=False,
    )
    if config.pad_token_id is None:
        config.pad_token_id = min(eos_ids, default=0)
    return config


def generator_of(request: Generation, device: torch.device) -> torch.Generator | None:
    """What draws a sequence's tokens, the same ones for the same seed; None where the likeliest are taken."""
    if not request.draws:
        return None
    generator = torch.Generator(device)
    if request.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.seed % 2**63)
    return generator


class Sampler:
    """Chooses one sequence's tokens; a seed makes its choices repeatable, whatever else is in the batch.

    Args:
        num_before: tokens that stand before the first one that is chosen: the prompt's; of a decoder behind an encoder,
            its start.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        request: Generation,
        eos_ids: frozenset[int],
        num_before: int | None = None,
    ) -> None:
        config: Any = generation_config(model, request, eos_ids)
        base: Any = model
        base._prepare_special_tokens(config, True, device=model.device)
        read = torch.tensor([request.prompt_ids], device=model.device)
        self._processors: LogitsProcessorList = base._get_logits_processor(
            config,
            input_ids_seq_length=len(request.prompt_ids) if num_before is None else num_before,
            encoder_input_ids=read if num_before is not None else None,
            device=str(model.device),
        )
        self._device = model.device
        self._generator = generator_of(request, model.device)

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether the next token is the one of the highest score, and nothing else is to be asked."""
        return self._generator is None and not self._processors

    def choose(self, scores: Tensor, ids: Sequence[int]) -> int | None:
        """The next token after `ids` from the model's scores (vocabulary,), fp32; None where they leave no shares to
        draw by."""
        scores = scores[None].clone()
        if self._processors:
            scores = self._processors(torch.tensor([ids], device=self._device), scores)  # type: ignore[arg-type]
        if self._generator is None:
            return int(scores.argmax(-1))
        shares = scores.softmax(-1)
        if not shares.isfinite().all():
            return None
        return int(torch.multinomial(shares, 1, generator=self._generator))


def likeliest_of(scores: Tensor) -> list[int | None]:
    """Each row's token of the highest score (rows, vocabulary); None where one of its scores is nan, or that one is not
    finite: nothing is to be chosen by them."""
    highest, at = scores.max(-1)  # nan where one of them is
    both = zip(at.tolist(), highest.isfinite().tolist(), strict=True)
    return [token if is_finite else None for token, is_finite in both]


def logprob_of(logprobs: Tensor, token: int, num_top: int) -> TokenLogprob:
    """What (vocabulary,) log-probabilities say of the token that was taken, and of so many of the likeliest."""
    values, ids = logprobs.topk(num_top)
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
