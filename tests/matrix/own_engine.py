"""A user's own `deepspeed.initialize` in place of our optimizer: two steps of SGD, and one process's beside them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peft_dist import get_peft_model, get_peft_model_state_dict, sharding
from peft_dist.rows import Rows
from tests.distributed import one_process as run
from tests.distributed.own_engine import own_engine
from tests.matrix import storages
from tests.matrix.axes import OFFLOAD, Cell

RATE, STEPS = 0.1, 2


def trained(cell: Cell) -> dict[str, Any]:
    """The losses of the global batches before each step and after the last, and by how much the adapter's furthest
    value moved; of a cell on one process by torch's own SGD."""
    config = run.METHODS[cell.method]()
    base = storages.base(cell.storage)
    torch.manual_seed(run.SEED)
    model = get_peft_model(base, config)
    run.disturb(model)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=RATE)
    before = get_peft_model_state_dict(model)
    if not dist.is_initialized():
        losses = [_step(model, model, step, optimizer) for step in range(STEPS)]
        losses.append(_loss(model, model, 0).item())
        return {"losses": losses, "moved": moved(before, get_peft_model_state_dict(model))}
    sharding.disable_deepspeed_op_builds()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    zero: dict[str, Any] = {"stage": cell.zero_stage, "stage3_param_persistence_threshold": 0}
    if cell.stage == OFFLOAD:
        zero["offload_param"] = {"device": "cpu"}
    engine = own_engine(model, optimizer, zero, run.PER_MICRO_BATCH // dist.get_world_size())
    losses = [_step(model, engine, step, None) for step in range(STEPS)]
    losses.append(run.over_all_ranks(_loss(model, engine, 0).detach().double()))
    return {"losses": losses, "moved": moved(before, get_peft_model_state_dict(model))}


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """By how much the furthest value moved; nan where the names differ."""
    if before.keys() != after.keys():
        return float("nan")
    return max(
        (float((after[key] - before[key]).abs().max()) for key in before if before[key].numel()), default=0.0
    )


def _step(model: Any, called: Any, step: int, optimizer: Any) -> float:
    loss = _loss(model, called, step)
    if optimizer is None:
        # An engine takes the mean over the ranks.
        called.backward(loss * dist.get_world_size())
        called.step()
    else:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return run.over_all_ranks(loss.detach().double())


def _loss(model: Any, called: Any, step: int) -> Tensor:
    """This rank's share of a global batch's loss."""
    ids, labels, indices = run.batch(step, 0)
    with model.using(Rows(samples=indices, seed=run.SEED, step=step)):
        outputs = called(input_ids=ids, attention_mask=torch.ones_like(ids), **run.read(model, indices))
    return run.token_loss_sum(outputs.logits, labels) / run.num_target_tokens(step, 1)
