"""Which jobs may stand on one base at once: from their specs, the base's config and the names of its tensors alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from peft_dist.catalog import METHODS, config_class
from peft_dist.contract import Method, PastMethod

from .job import JobSpec
from .tasks import TASKS

_OF_ITS_START = {
    "loftq": "init_lora_weights: loftq puts another weight in the place of the base's",
    "corda": "init_lora_weights: corda looks at the bare base before it is wrapped",
}
_HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_CAPACITY = ("switch_transformers", "nllb-moe")
BATCH_NORM = "the base has batch norm, whose statistics are of all rows of a batch"


def unshareable(spec: JobSpec) -> str | None:
    """Why a run of this job needs a base for itself, in a few words; None where others may stand on it too."""
    if spec.training.base_dropout:
        return "training.base_dropout: true draws the base's own dropout for the rows of a whole forward"
    return changes_base(spec)


def changes_base(spec: JobSpec) -> str | None:
    """Why the base is another once a run of this job has stood on it; None where it stays as it is."""
    fields, row = spec.adapter.fields, METHODS.get(spec.adapter.type.upper())
    if why := _OF_ITS_START.get(str(fields.get("init_lora_weights"))):
        return why
    if fields.get("layer_replication") is not None:
        return "layer_replication makes the base's layers others"
    if row is not None and row.tuner is not None:
        return f"{spec.adapter.type} is given by hooks of its own, which change the base in place"
    return None


def looks_ahead(kind: str) -> bool:
    """Whether a method is made of adapters that it weighs by a first run over all tokens, so that none of them may
    come from a cache."""
    config = config_class(kind.upper())
    return issubclass(config, Method) and config.assemble is not Method.assemble


def keeps_past(kind: str) -> bool:
    """Whether a method's virtual tokens stand in the base's cache of keys and values."""
    row = METHODS.get(kind.upper())
    return row is not None and issubclass(config_class(kind.upper()), PastMethod)


def mixes_rows(config: Mapping[str, Any], tensors: Iterable[str] = ()) -> str | None:
    """Why runs on a base would reach each other's rows; None where they do not.

    Args:
        config: the base's, as plain values.
        tensors: the names of its weights and buffers.
    """
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config
    kind = str(config.get("model_type", ""))
    if kind in _CAPACITY:
        return f"the experts of {kind} take so many tokens of a batch and no more"
    if config.get("output_router_logits"):
        return "its router's balance loss is over all rows of a batch (output_router_logits)"
    if any(name.rsplit(".", 1)[-1] == "running_mean" for name in tensors):
        return BATCH_NORM
    return None


def base_key(spec: JobSpec, precision: str = "", zero_stage: int = 0, *, on_gpu: bool = False) -> str:
    """A digest of what runs on one base have in common; those of equal keys may share it, at once or one after the
    other (`unshareable`).

    Args:
        precision: what `training.precision` came to, where that is known.
        zero_stage, on_gpu: of the plan.
    """
    training = spec.training
    kinds = [dataset.type for dataset in spec.data.datasets]
    facts = {
        "model": spec.model.model_dump(mode="json"),
        "data": spec.data.model_dump(mode="json"),
        "eval": spec.eval.model_dump(mode="json"),
        "precision": precision or training.precision,
        "gradient_checkpointing": training.gradient_checkpointing,
        "keeps its activations": on_gpu and keeps_past(spec.adapter.type),
        "base_dropout": training.base_dropout,
        "resources": spec.resources.model_dump(mode="json"),
        "zero_stage": zero_stage,
        "deepspeed": spec.model_dump(mode="json", include={"deepspeed"}),
        "keeps no cache": looks_ahead(spec.adapter.type),
        # a head that is not in the base's files begins from the seed
        "head": training.seed if any(TASKS[kind].task in _HEADED for kind in kinds) else None,
        "alone": spec.model_dump_json() if changes_base(spec) else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
