"""The engine of a replica, as its options ask for it."""

from __future__ import annotations

import logging

from .base_model import Base
from .batching import BatchingEngine
from .continuous import UnfitBase
from .desired import EngineOptions
from .engine import Engine
from .prompts import Prompts
from .sequential import SequentialEngine

_log = logging.getLogger("ray.serve")


def engine_for(base: Base, prompts: Prompts, options: EngineOptions) -> Engine:
    """One that batches; for a base that cannot be run so, one that takes a request at a time.

    Raises:
        ValueError: `deterministic` for another base than one in fp32 on a CPU.
        UnfitBase: `deterministic` for a base that takes one request at a time.
    """
    context = min(base.max_context, options.max_context or base.max_context)
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
