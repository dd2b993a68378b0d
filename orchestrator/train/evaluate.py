"""Evaluation: the loss on held-out rows and metrics of generated answers, the same code for every adapter.

Batches are cut from the rows in their order, by global index, and dealt to the ranks in turn; the sums of
each batch are collected and added in that order. The result does not depend on the number of ranks, bit for
bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peft_dist
from orchestrator.errors import DataError
from orchestrator.spec.job import EvalSpec

from .batches import collate
from .data import Example
from .group import Group
from .loss import IGNORED, num_targets, target_loss

ADAPTER = "default"
"""The name of the adapter that a run trains, inside its model."""


class Stopped(Exception):
    """A stop was asked for; every rank raises it at the same place."""


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate and how; the same object serves each adapter of a comparison.

    Args:
        rows: the evaluation's rows in their order.
        tokenizer: decodes what is generated.
        batch_size: rows per forward of one rank.
        group: the ranks that share the work.
        spec: `metrics`, `max_rows`, `max_new_tokens`.
        is_sharded: ZeRO-3: every rank must take part in every forward.
        should_stop: asked before each batch.
    """

    rows: Sequence[Example]
    tokenizer: Any
    batch_size: int
    group: Group
    spec: EvalSpec
    is_sharded: bool = False
    should_stop: Callable[[], bool] = lambda: False

    @property
    def used(self) -> Sequence[Example]:
        """The rows that `max_rows` leaves."""
        return self.rows[: self.spec.max_rows]

    def measure(self, model: nn.Module, known_loss: float | None = None) -> dict[str, float]:
        """`eval_loss`, `perplexity` and the generated metrics of the model as it is; {} without rows.

        Args:
            known_loss: `eval_loss`, where these rows were measured with this adapter already.
        """
        if not self.used:
            return {}
        with _evaluating(model):
            loss = self._loss(model) if known_loss is None else known_loss
            metrics = {"eval_loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
            if self.spec.metrics:
                metrics |= self._generated(model)
        return metrics

    def loss_only(self, model: nn.Module) -> dict[str, float]:
        """`eval_loss` alone, for evaluations while a run trains."""
        if not self.used:
            return {}
        with _evaluating(model):
            return {"eval_loss": self._loss(model)}

    def _loss(self, model: nn.Module) -> float:
        def sums(batch: Sequence[Example], is_real: bool) -> list[float]:
            tensors = self._tensors(batch)
            with torch.no_grad():
                out = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"])
                total = float(target_loss(out.logits, tensors["labels"]))
            return [total, float(num_targets(tensors["labels"]))]

        total, count = self._over_batches(self.used, sums, width=2)
        if count == 0:
            raise DataError(
                f"none of the {len(self.used)} evaluation rows has a target token.",
                where="data",
                hint="Raise data.sequence_len, or see `raypeft inspect` for what is trained on.",
            )
        return total / count

    def _generated(self, model: nn.Module) -> dict[str, float]:
        rows = [row for row in self.used if row.prompt_len > 0 and row.answer.strip()]
        if not rows:
            raise DataError(
                f"{', '.join(self.spec.metrics)}: none of the {len(self.used)} evaluation rows has a prompt "
                "and an answer to compare with.",
                where="eval.metrics",
                hint="Generated metrics need rows of type chat, prompt_completion or alpaca.",
            )

        def hits(batch: Sequence[Example], is_real: bool) -> list[float]:
            texts = self._generate(model, batch)
            exact = sum(text == row.answer.strip() for text, row in zip(texts, batch, strict=True))
            contains = sum(row.answer.strip() in text for text, row in zip(texts, batch, strict=True))
            return [float(exact), float(contains)]

        exact, contains = self._over_batches(rows, hits, width=2)
        every = {"exact_match": exact / len(rows), "contains": contains / len(rows)}
        return {name: every[name] for name in self.spec.metrics}

    def _over_batches(
        self, rows: Sequence[Example], work: Callable[[Sequence[Example], bool], list[float]], width: int
    ) -> list[float]:
        """The sum of `work` over all batches of `rows`, shared out over the ranks."""
        batches = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        found = [0.0] * (width * len(batches))
        for turn in range(math.ceil(len(batches) / self.group.size)):
            if self.group.any(self.should_stop()):
                raise Stopped
            number = turn * self.group.size + self.group.rank
            if number < len(batches):
                found[width * number : width * number + width] = work(batches[number], True)
            elif self.is_sharded:
                work(batches[0][:1], False)
        summed = self.group.sum(found)
        return [math.fsum(summed[part::width]) for part in range(width)]

    def _tensors(self, batch: Sequence[Example]) -> dict[str, torch.Tensor]:
        return {
            key: value.to(self.group.device) for key, value in collate(batch, pad_id(self.tokenizer)).items()
        }

    def _generate(self, model: nn.Module, batch: Sequence[Example]) -> list[str]:
        """Greedy answers to the prompts of `batch`, which are padded on the left; stripped text."""
        prompts = [row.input_ids[: row.prompt_len] for row in batch]
        width, pad, ends = max(map(len, prompts)), pad_id(self.tokenizer), _ends(model, self.tokenizer)
        room = getattr(model.config, "max_position_embeddings", None)
        longest = self.spec.max_new_tokens if room is None else min(self.spec.max_new_tokens, room - width)
        ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with torch.no_grad():
            out = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(ids, device=self.group.device),
                attention_mask=torch.tensor(mask, device=self.group.device),
                max_new_tokens=max(1, longest),
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
                eos_token_id=sorted(ends) or None,
                use_cache=True,
                synced_gpus=self.is_sharded and self.group.size > 1,
            )
        answers = out[:, width:].tolist()
        return [self.tokenizer.decode(_until(one, ends), skip_special_tokens=True).strip() for one in answers]


def compare(evaluation: Evaluation, model: nn.Module, others: Mapping[str, str]) -> dict[str, float]:
    """Metrics of the bare base as `base.NAME` and of each other adapter as `LABEL.NAME`, over the same rows.

    Args:
        others: label -> local directory of an adapter for the same base.
    """
    with model.disable_adapter():  # type: ignore[operator]
        found = _named("base", evaluation.measure(model))
    for label, directory in others.items():
        model.load_adapter(str(directory), label)  # type: ignore[operator]
        model.set_adapter(label)  # type: ignore[operator]
        try:
            found |= _named(label, evaluation.measure(model))
        finally:
            model.set_adapter(ADAPTER)  # type: ignore[operator]
            model.delete_adapter(label)  # type: ignore[operator]
    return found


def evaluate_adapter(
    base: nn.Module,
    tokenizer: Any,
    adapter_dir: str | Path | None,
    rows: Sequence[Example],
    spec: EvalSpec = EvalSpec(),
    *,
    batch_size: int = 8,
    device: str = "cpu",
) -> dict[str, float]:
    """Metrics of one adapter, or of the bare base (`adapter_dir=None`), in this process.

    The base comes back without the adapter; loaded by `peft_dist.loading.load_base`.
    """
    evaluation = Evaluation(rows, tokenizer, batch_size, Group(device), spec)
    if adapter_dir is None:
        return evaluation.measure(base.to(device))
    model = peft_dist.PeftModel.from_pretrained(base, str(adapter_dir), adapter_name=ADAPTER).to(device)
    try:
        return evaluation.measure(model)
    finally:
        model.unload()


def pad_id(tokenizer: Any) -> int:
    """The token that fills rows up: the tokenizer's own, else its end of text, else 0. Masked everywhere."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _named(label: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{label}.{name}": value for name, value in metrics.items()}


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return {end for end in [*listed, tokenizer.eos_token_id] if end is not None}


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first end."""
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[:position]
    return tokens


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


__all__ = ["ADAPTER", "IGNORED", "Evaluation", "Stopped", "compare", "evaluate_adapter", "pad_id"]
