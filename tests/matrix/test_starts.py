"""Variants of LoRA whose start reads the base, and may change it: on meta over a base on meta, and filled at ZeRO-3.

The other methods that read the base (DeLoRA, OSF, LN tuning, SHiRA, trainable tokens) are cells of the matrix.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from peft_dist import LoraConfig, get_peft_model
from tests.distributed import one_process as run
from tests.matrix import storages
from tests.matrix.cell import ZERO3
from tests.ranks import run_on_ranks

VARIANTS: dict[str, dict[str, Any]] = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "MiCA": {"init_lora_weights": "mica"},
    "DoRA": {"use_dora": True},
}
STORAGES = ("fp32", "bf16", "nf4")
Started = dict[tuple[str, str], dict[str, Tensor]]


def started(on_meta: bool) -> Started:
    """(variant, storage) -> the adapter's tensors, and the logits of the model with it."""
    found = {}
    for variant, values in VARIANTS.items():
        for storage in STORAGES:
            config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **values)
            base = storages.on_meta(storage) if on_meta else storages.base(storage)
            torch.manual_seed(run.SEED)
            model = get_peft_model(base, config, low_cpu_mem_usage=on_meta)
            if on_meta:
                torch.manual_seed(run.SEED)
                storages.fill(model, storage, {"zero_optimization": ZERO3})
            tensors = {key: t.detach().float().clone() for key, t in model.adapter_tensors().items()}
            found[variant, storage] = {**tensors, "logits": run.evaluate(model).float()}
    return found


def started_in_pieces() -> str:
    """What comes of starts that read the pieces of weights as they lie."""
    with mock.patch("peft_dist.base_layer.layer.gathered", lambda p, modify=False: contextlib.nullcontext()):
        try:
            started(on_meta=True)
        except Exception as error:
            return type(error).__name__
    return "started"


@pytest.fixture(scope="module")
def alone() -> Started:
    for storage in STORAGES:
        storages.prepared(storage)
    return started(on_meta=False)


def test_they_start_from_the_base_as_in_one_process(alone: Started) -> None:
    for rank in run_on_ranks(started, 2, True):
        for cell, wanted in alone.items():
            assert rank[cell].keys() == wanted.keys(), cell
            for key, value in wanted.items():
                # bf16: sums in another order round to a neighbour, 2^-8 away.
                close = 3e-2 if cell[1] == "bf16" else 1e-5
                torch.testing.assert_close(
                    rank[cell][key],
                    value,
                    rtol=close,
                    atol=close,
                    msg=lambda m, c=cell, k=key: f"{c} {k}: {m}",
                )


def test_pieces_are_no_start() -> None:
    storages.prepared("fp32")
    assert "started" not in run_on_ranks(started_in_pieces)
