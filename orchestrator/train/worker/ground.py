"""What runs on one base have in common on a rank, loaded once: tokenizer, rows, the base, and the optimizer's group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from orchestrator.chat_template import NO_TEMPLATE
from orchestrator.errors import SpecError
from orchestrator.runner import TrainRequest
from orchestrator.spec.job import JobSpec
from orchestrator.spec.sharing import BATCH_NORM, changes_base, looks_ahead, mixes_rows, unshareable
from peft_dist.loading import load_config
from peft_dist.optim import AdapterOptimizer

from ..group import Group
from ..rows.task_ids import task_numbers
from ..rows.tokenizer import load_tokenizer
from ..tasks import task_class
from ..tasks.task import pad_id
from .data import Examples, load_examples
from .inspection import max_positions
from .model import load_frozen_base

Emit = Callable[..., None]


class Ground:
    """A base and all beside it that does not belong to one run.

    Args:
        emit: tells an event: its kind, and its fields by name.

    Attributes:
        base: frozen, without adapters as it comes. model: the base with the adapters of all runs that share it, once
            there is one. optimizer: of all adapters on the base. bare: what was measured of the bare base, by what
            was asked for. taken: why no run can enter any more; empty where one can. alone: why runs stand on it one
            after the other; None where they may at once. statistics: of batch norm, and as they were loaded.
    """

    def __init__(self, request: TrainRequest, group: Group, precision: str, emit: Emit) -> None:
        self.request, self.group, self.precision = request, group, precision
        self.spec = request.spec
        self.tokenizer = load_tokenizer(self.spec.model)
        has_template = bool(self.tokenizer.chat_template)
        told = self.spec.model
        config = load_config(
            told.base_model, revision=told.revision, trust_remote_code=told.trust_remote_code
        ).to_dict()
        self._config = config
        self._examples: dict[str, Examples] = {}
        examples = self.examples_of(self.spec)
        emit("state", state="starting", message=examples.report.sentence())
        if not has_template and any(each.type == "chat" for each in self.spec.data.datasets):
            emit("warning", message=NO_TEMPLATE)
        self.labels = examples.facts.labels if task_class(self.spec).has_labels else None
        self.is_sharded = request.plan.zero_stage == 3 and group.is_distributed
        self.base = load_frozen_base(
            self.spec,
            precision,
            group.device,
            labels=self.labels,
            pad_token_id=pad_id(self.tokenizer),
            shards=request.plan.deepspeed if self.is_sharded else None,
        )
        norms = list(_batch_norms(self.base))
        mixes = BATCH_NORM if norms else mixes_rows(config)
        self.alone = unshareable(self.spec) or mixes
        self.statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
        self.model: nn.Module | None = None
        self.optimizer = AdapterOptimizer(stage=request.plan.zero_stage)  # type: ignore[arg-type]
        self.taken = ""
        self.bare: dict[Any, dict[str, float]] = {}

    def examples_of(self, spec: JobSpec) -> Examples:
        """The rows of a run; those of runs that read the same are read once."""
        sections = (spec.data.model_dump_json(), spec.eval.model_dump_json(), task_numbers(spec.adapter))
        key = repr((*sections, max_positions(self._config, spec)))
        if key not in self._examples:
            self._examples[key] = load_examples(
                spec, self.tokenizer, max_len=max_positions(self._config, spec)
            )
        return self._examples[key]

    def check(self, spec: JobSpec, others: int) -> None:
        """Whether a run may stand on this base now. What rows of runs before have changed of the base is as it was
        loaded again.

        Args:
            others: how many runs stand on it.

        Raises:
            SpecError: alone it would have another base: of other labels, or of a head that begins otherwise; or it
                cannot stand beside others.
        """
        if self.taken:
            raise SpecError(f"a run before has changed the base: {self.taken}.", hint="Start another group.")
        why = unshareable(spec) or self.alone
        if why and (others or (changes_base(spec) and self.model is not None)):
            raise SpecError(f"no other run may stand on the same base: {why}.", hint="Set sweep.pack: 1.")
        if looks_ahead(spec.adapter.type) != looks_ahead(self.spec.adapter.type):
            kinds = sorted({spec.adapter.type, self.spec.adapter.type}, key=looks_ahead)
            raise SpecError(
                f"{kinds[1]} weighs its adapters by a run over all tokens, on a base that keeps no cache; {kinds[0]} "
                "stands on one that does.",
                where="adapter.type",
            )
        if spec.training.base_dropout != self.spec.training.base_dropout:
            raise SpecError(
                "the base was loaded with its own dropout as another run asks for it.",
                where="training.base_dropout",
            )
        if task_class(spec) is not task_class(self.spec):
            raise SpecError("runs of another task need a base with another head.", where="data.datasets")
        labels = self.examples_of(spec).facts.labels if task_class(spec).has_labels else None
        if labels != self.labels:
            raise SpecError("runs of other labels need a base with another head.", where="data.datasets")
        begun = getattr(self.base, "begun_anew", ())
        if begun and spec.training.seed != self.spec.training.seed:
            raise SpecError(
                f"the base's {sorted(begun)[0]} is not in its files and begins from the seed: a run of another seed "
                "has another base.",
                where="training.seed",
            )
        with torch.no_grad():
            for buffer, loaded in self.statistics:
                buffer.copy_(loaded)

    def release_memory(self) -> None:
        """Gives back what the device's allocator keeps of a forward that did not fit."""
        if self.group.device != "cpu":
            torch.cuda.empty_cache()


def _batch_norms(base: nn.Module) -> Iterator[nn.Module]:
    return (module for module in base.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
