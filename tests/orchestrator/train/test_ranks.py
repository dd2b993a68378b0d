"""A whole run on several gloo ranks: every ZeRO stage, a rank without rows, evaluation free of the world size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.train.worker.run import train
from tests.ranks import RankFailed, run_on_ranks

from .ends import difference
from .tiny import job, plan, request

METRICS = {"metrics": ["exact_match", "contains"], "max_new_tokens": 4}


def on_rank(folder: Path, spec, made_plan, run: str):
    torch.set_num_threads(1)
    return train(request(folder, spec, made_plan, run=run))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_what_one_does(tmp_path, stage):
    # 18 rows in global batches of 8: the last one is short
    spec = job(
        tmp_path, adapter={"lora_dropout": 0.2}, training={"max_steps": 9, "num_epochs": 3}, eval=METRICS
    )
    (alone,) = run_on_ranks(on_rank, 1, tmp_path, spec, plan(micro=2, accumulation=4, stage=stage), "alone")
    both = run_on_ranks(
        on_rank, 2, tmp_path, spec, plan(workers=2, accumulation=2, stage=stage), f"both{stage}"
    )
    assert both[0] == both[1]
    # nine steps of AdamW at 1e-2 in fp32; rows are padded in other groups
    assert difference(alone, both[0]) < 2e-3
    assert both[0].metrics["eval_loss"] == pytest.approx(alone.metrics["eval_loss"], rel=1e-4)
    # the same base, rows and batches: the number of ranks is nowhere in the arithmetic
    for name in ("base.eval_loss", "base.exact_match"):
        assert both[0].metrics[name] == alone.metrics[name]


def test_a_rank_without_rows_takes_part(tmp_path):
    spec = job(tmp_path, rows=6)
    ends = run_on_ranks(on_rank, 3, tmp_path, spec, plan(workers=3, stage=3), "three")
    (alone,) = run_on_ranks(on_rank, 1, tmp_path, spec, plan(micro=6), "alone")
    # one row is trained, by one rank of three; one step, so that only the sum's order differs
    assert difference(ends[0], alone) < 1e-5


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    spec = job(tmp_path, training={"num_epochs": 2})
    halved = spec.model_copy(
        update={"training": spec.training.model_copy(update={"lr_scheduler": "constant"})}
    )
    first = halved.model_copy(update={"training": halved.training.model_copy(update={"num_epochs": 1})})
    (whole,) = run_on_ranks(on_rank, 1, tmp_path, halved, plan(micro=2, accumulation=2), "whole")
    run_on_ranks(on_rank, 2, tmp_path, first, plan(workers=2, stage=2), "parts")
    (end,) = run_on_ranks(on_rank, 1, tmp_path, halved, plan(micro=2, accumulation=2), "parts")
    assert end.steps == whole.steps == 10
    # as above: ten steps of AdamW at 1e-2 in fp32
    assert difference(whole, end) < 2e-3


def forget_the_sum(folder: Path, spec, made_plan, run: str):
    from peft_dist.optim import AdapterOptimizer

    def keep_own(self, keep_whole=False, names=None):
        self._reduced |= set(self._adapters)
        for tensor in self._tensors():
            tensor.has_grad = tensor.parameter.grad is not None

    AdapterOptimizer.reduce = keep_own  # type: ignore[method-assign]
    return on_rank(folder, spec, made_plan, run)


def test_negative_control_ranks_that_do_not_sum(tmp_path):
    spec = job(tmp_path, training={"max_steps": 9, "num_epochs": 3})
    (alone,) = run_on_ranks(on_rank, 1, tmp_path, spec, plan(micro=2, accumulation=4), "alone")
    both = run_on_ranks(forget_the_sum, 2, tmp_path, spec, plan(workers=2, accumulation=2, stage=0), "both")
    assert difference(alone, both[0]) > 2e-3


def compile_ops(folder: Path, spec, made_plan, run: str):
    import deepspeed

    from peft_dist import sharding

    vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": True}
    sharding.disable_deepspeed_op_builds = lambda: None
    return on_rank(folder, spec, made_plan, run)


@pytest.fixture
def stale_lock(tmp_path, monkeypatch) -> Path:
    """What a compilation of DeepSpeed's that was killed leaves behind: whoever compiles waits for it for ever."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


def test_a_stale_lock_of_the_compiler_holds_nobody_up(tmp_path, stale_lock):
    before = sorted(stale_lock.rglob("*"))
    ends = run_on_ranks(on_rank, 2, tmp_path, job(tmp_path), plan(workers=2, stage=3), "locked")
    assert ends[0].steps == 5 and sorted(stale_lock.rglob("*")) == before, "nothing is compiled"


def test_negative_control_a_run_that_compiles_waits_for_the_lock(tmp_path, stale_lock):
    with pytest.raises(RankFailed, match="did not finish in time"):
        run_on_ranks(
            compile_ops, 2, tmp_path, job(tmp_path), plan(workers=2, stage=3), "locked", timeout_s=10
        )


def test_a_failing_rank_says_why(tmp_path):
    spec = job(tmp_path, data={"datasets": [{"path": str(tmp_path / "none.jsonl"), "type": "text"}]})
    with pytest.raises(RankFailed, match=r"none\.jsonl"):
        run_on_ranks(on_rank, 2, tmp_path, spec, plan(workers=2), "broken")
