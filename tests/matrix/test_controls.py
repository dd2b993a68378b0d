"""Each claim of the matrix without its mechanism: the cell says that it does not hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
from torch import nn

from peft_dist import sharding
from tests.distributed import one_process as run
from tests.matrix import storages
from tests.matrix.axes import ALONE, STAGES, Cell
from tests.matrix.group import lives
from tests.matrix.verdict import verdict
from tests.ranks import run_on_ranks


@dataclass(frozen=True)
class Control:
    """What is put in the place of a mechanism, and what a cell then says of which check."""

    check: str
    cell: Cell
    mechanism: str
    instead: Any
    says: str


def _not_gathered(parameters: Any, *, modify: bool = False) -> Any:
    return contextlib.nullcontext()


def _not_written(parameters: Any, *, modify: bool = False, real: Callable = sharding.gathered) -> Any:
    return real(parameters)


def _as_it_lies(parameter: Any) -> Any:
    return parameter.detach().clone()


def _given_back(value: Any) -> Any:
    return value


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


CONTROLS = {
    "a start that reads pieces": Control(
        "injects",
        # Its adapters come last, onto pieces.
        Cell("DELORA", "ZeRO-3", "fp32"),
        "peft_dist.base_layer.layer.gathered",
        _not_gathered,
        "no: base_model.model.model.layers.0.self_attn.q_proj.delora_w_norm starts elsewhere",
    ),
    "gradients that are not summed": Control(
        "trains",
        Cell("IA3", "ZeRO-1", "fp32"),
        "peft_dist.optim.AdapterOptimizer._sum",
        _nothing,
        "no: losses ",
    ),
    "an unused adapter with a gradient of zero": Control(
        "mixed",
        Cell("ADAPTION_PROMPT", "ZeRO-3", "fp32"),
        "peft_dist.adapted.block._apart",
        _given_back,
        "no: an adapter that no rank used was changed",
    ),
    "a file of pieces": Control(
        "saves",
        # It sits on embeddings of the base, which travel with it.
        Cell("LORA", "ZeRO-3", "fp32"),
        "peft_dist.checkpoint.state.whole",
        _as_it_lies,
        "no: saves: CheckpointError",
    ),
    "values that a load does not set": Control(
        "loads",
        Cell("IA3", "ZeRO-2", "fp32"),
        "peft_dist.checkpoint.filling.set_whole",
        _nothing,
        "no: what was filled moved by",
    ),
    "a merge that no rank writes back": Control(
        "merges",
        Cell("IA3", "ZeRO-3", "fp32"),
        "peft_dist.base_layer.layer.gathered",
        _not_written,
        "no: merged logits off by",
    ),
    "layers that nobody releases": Control(
        "holds",
        Cell("IA3", "ZeRO-3", "fp32"),
        "peft_dist.sharding._release_when_done",
        _nothing,
        "no: [",
    ),
    "counts of what rests here": Control(
        "truth",
        Cell("IA3", "ZeRO-3", "fp32"),
        "peft_dist.model.num_elements",
        nn.Parameter.numel,
        "no: printed: ",
    ),
}


def without(control: Control) -> dict[str, Any]:
    with mock.patch(control.mechanism, control.instead):
        return lives(control.cell.stage, control.cell.storage, [control.cell.method])


@pytest.mark.parametrize("name", CONTROLS)
def test_without_its_mechanism_a_claim_does_not_hold(name: str) -> None:
    control = CONTROLS[name]
    cell = control.cell
    run.experts()
    storages.prepared(cell.storage)
    one = lives(ALONE, cell.storage, [cell.method], oracle=True)[cell.method]
    ranks = run_on_ranks(without, STAGES[cell.stage][1], control)
    said = verdict(cell, [each[cell.method] for each in ranks], one)[control.check]
    assert said.startswith(control.says) and said != "yes", said
