"""Multitask prompt tuning: one prompt that all tasks share, times a low-rank matrix of each task.

P_t = P ⊙ (C_t R_t), C_t (n, r), R_t (r, d). A batch says with `task_ids` (rows,) which task each row is of. The
decoder of a base that has one gets tokens too.

Wang et al. 2023, arXiv:2303.02861. Starts from a source's file are read from safetensors alone.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from peft_dist.contract import BaseLayer, Param, Params, Site
from peft_dist.errors import CheckpointError, ConfigError, RowsError
from peft_dist.lazy import lazy
from peft_dist.methods.prompt.prompt_tuning import PromptTuningConfig

if TYPE_CHECKING:
    from torch import Tensor

safetensors_torch = lazy("safetensors.torch")


class MultitaskPromptTuningInit(enum.StrEnum):
    """Where prompt and matrices start: the last three from the file of a source's training."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """HF PEFT's MultitaskPromptTuningConfig.

    Args:
        prompt_tuning_init: RANDOM or TEXT as in prompt tuning; AVERAGE_SOURCE_TASKS: the source's prompt and
            the mean of its tasks' matrices; EXACT_SOURCE_TASK: its prompt and one task's; ONLY_SOURCE_SHARED:
            its prompt.
        prompt_tuning_init_state_dict_path: the source's safetensors file.
        prompt_tuning_init_task: the task of EXACT_SOURCE_TASK.
        num_ranks: r, at least 1. num_tasks: at least 1.
    """

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    starts_from: ClassVar[type[enum.StrEnum]] = MultitaskPromptTuningInit
    reads: ClassVar[tuple[str, ...]] = ("task_ids",)
    in_decoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "MULTITASK_PROMPT_TUNING"
        for name in ("num_ranks", "num_tasks"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(
                    f"MultitaskPromptTuningConfig.{name}: {value!r}; it is a whole number of at least 1."
                )

    def params(self, site: Site) -> dict[str, Param]:
        tokens, T, r = self.total_tokens, self.num_tasks, self.num_ranks
        assert T is not None and r is not None
        shapes = {
            "prefix_task_cols": (("tasks", "tokens", "rank"), (T, tokens, r)),
            "prefix_task_rows": (("tasks", "rank", "out"), (T, r, site.out)),
        }
        return super().params(site) | {
            name: Param(f"prompt_encoder.{name}", dims, shape, _small, saved=name)
            for name, (dims, shape) in shapes.items()
        }

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        super().start_from_base(p, base)
        if self.prompt_tuning_init in FROM_SOURCE:
            for name, value in self._source().items():
                if value.shape != p[name].shape:
                    raise CheckpointError(
                        f"{self.prompt_tuning_init_state_dict_path}: {name} gives {tuple(value.shape)} with "
                        f"prompt_tuning_init {self.prompt_tuning_init}, but this prompt's is "
                        f"{tuple(p[name].shape)}. num_tasks, num_ranks, num_virtual_tokens and the base's width "
                        "must fit the source's."
                    )
                p[name].copy_(value)

    def _source(self) -> dict[str, Tensor]:
        path, where = self.prompt_tuning_init_state_dict_path, type(self).__name__
        if path is None:
            raise ConfigError(
                f"{where}.prompt_tuning_init_state_dict_path: must be given when prompt_tuning_init is "
                f"{self.prompt_tuning_init}."
            )
        if not os.fspath(path).endswith(".safetensors") or not Path(path).is_file():
            raise CheckpointError(
                f"{where}.prompt_tuning_init_state_dict_path: {path!r} is no safetensors file; other formats "
                "are not read. Save the source again."
            )
        found = safetensors_torch.load_file(path)
        names = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
        wanted = names[:1] if self.prompt_tuning_init == "ONLY_SOURCE_SHARED" else names
        absent = [name for name in wanted if name not in found]
        if absent:
            raise CheckpointError(f"{path}: has no {', '.join(absent)}; it is no multitask prompt.")
        source = {"embeddings": found["prompt_embeddings"]}
        for name in wanted[1:]:
            of_tasks = found[name]
            if self.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
                source[name] = of_tasks.mean(0, keepdim=True)
            else:
                task = self.prompt_tuning_init_task
                if type(task) is not int or not -len(of_tasks) <= task < len(of_tasks):
                    raise ConfigError(
                        f"{where}.prompt_tuning_init_task: {task!r}, but the source has {len(of_tasks)} tasks."
                    )
                source[name] = of_tasks[task].unsqueeze(0)
        return source

    def embeds(self, p: Params, training: bool = False) -> Tensor:
        if "task_ids" not in p:
            raise RowsError(
                "task_ids: MultitaskPromptTuningConfig needs one for each sequence. Pass task_ids=... to the "
                "model's forward or generate."
            )
        tasks = p["task_ids"]
        if tasks.is_floating_point() or tasks.ndim != 1:
            raise RowsError(
                f"task_ids: {tuple(tasks.shape)} of {tasks.dtype}; they are whole numbers, one a row."
            )
        if len(tasks) and not 0 <= int(tasks.min()) <= int(tasks.max()) < self.num_tasks:  # type: ignore[operator]
            raise RowsError(
                f"task_ids: {tasks.tolist()}, but the adapter has {self.num_tasks} tasks, from 0."
            )
        return p["embeddings"] * (p["prefix_task_cols"][tasks] @ p["prefix_task_rows"][tasks])


def _small(t: Tensor) -> Tensor:
    return t.normal_(std=0.02)
