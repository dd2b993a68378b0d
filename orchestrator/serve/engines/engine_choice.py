"""The engine of a replica, as its task and its options ask for it."""

from __future__ import annotations

import logging

from ..desired import EngineOptions
from .base_model import Base
from .batching import BatchingEngine
from .continuous import UnfitBase
from .engine import Engine
from .head_engine import HeadEngine
from .heads import Heads, HeadTask
from .prompts import Prompts
from .seq2seq import TASK as SEQ2SEQ
from .seq2seq import Seq2SeqEngine
from .sequential import SequentialEngine

_log = logging.getLogger("ray.serve")


def heads_for(base: Base, task: HeadTask, options: EngineOptions) -> Heads:
    """What answers for a base with a task's head. `deterministic` runs each text alone."""
    return HeadEngine(
        base.model,
        base.tokenizer,
        task,
        min(base.max_context, options.max_context or base.max_context),
        max_tokens=options.max_batch_tokens,
        one_by_one=options.deterministic,
    )


def engine_for(base: Base, prompts: Prompts, options: EngineOptions, task: str = "CAUSAL_LM") -> Engine:
    """One that batches; for a base that cannot be run so, one that takes a request at a time.

    Raises:
        ValueError: `deterministic` for another base than one in fp32 on a CPU.
        UnfitBase: `deterministic` for a base that takes one request at a time.
    """
    context = min(base.max_context, options.max_context or base.max_context)
    if task == SEQ2SEQ:
        return Seq2SeqEngine(
            base.model,
            prompts.decode,
            base.eos_ids,
            context,
            max_tokens=options.max_batch_tokens,
            one_by_one=options.deterministic,
        )
    try:
        return BatchingEngine(
            base.model,
            prompts.decode,
            base.eos_ids,
            context,
            max_batch_tokens=options.max_batch_tokens,
            deterministic=options.deterministic,
        )
    except UnfitBase as error:
        if options.deterministic:
            raise
        _log.warning("requests are answered one at a time: %s", error)
        return SequentialEngine(base.model, prompts.decode, base.eos_ids, context)
