"""One step is one global batch, whoever computes it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.train.rows.batches import collate, epoch_order, num_steps, share, steps
from orchestrator.train.rows.render import IGNORED, Example

JOBS = st.fixed_dictionaries(
    {
        "num_examples": st.integers(1, 70),
        "epochs": st.integers(1, 3),
        "max_steps": st.none() | st.integers(1, 12),
        "global_batch_size": st.integers(1, 24),
        "seed": st.integers(0, 5),
    }
)


def by_rank(job, world_size, micro_batch_size=2, start_step=0):
    job = dict(job)
    examples = job.pop("num_examples")
    return [
        list(
            steps(
                examples,
                **job,
                micro_batch_size=micro_batch_size,
                world_size=world_size,
                rank=rank,
                start_step=start_step,
            )
        )
        for rank in range(world_size)
    ]


def global_batches(ranks):
    """For each step: all indices in the order of ranks and micro-batches."""
    together = zip(*ranks, strict=True)
    return [[i for part in parts for micro in part.micro for i in micro] for parts in together]


@settings(max_examples=150)
@given(job=JOBS, world_size=st.integers(1, 5), micro=st.integers(1, 7))
def test_global_batch_does_not_depend_on_workers_or_accumulation(job, world_size, micro):
    assert global_batches(by_rank(job, world_size, micro)) == global_batches(by_rank(job, 1, 1))


@settings(max_examples=150)
@given(job=JOBS, world_size=st.integers(1, 5), micro=st.integers(1, 7))
def test_every_rank_takes_part_in_every_forward_and_keeps_to_its_size(job, world_size, micro):
    for parts in zip(*by_rank(job, world_size, micro), strict=True):
        assert len({(part.step, part.epoch, len(part.micro)) for part in parts}) == 1
        assert all(len(batch) <= micro for part in parts for batch in part.micro)
        for part in parts:
            assert [len(batch) for batch in part.micro] == [len(batch) for batch in part.samples]
        places = [i for part in parts for batch in part.samples for i in batch]
        assert places == list(range(len(places)))  # contiguous shares, in the order of ranks
        sizes = [sum(map(len, part.micro)) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=100)
@given(job=JOBS, world_size=st.integers(1, 4), start=st.integers(0, 30))
def test_resumed_run_goes_on_exactly(job, world_size, start):
    whole, resumed = by_rank(job, world_size), by_rank(job, world_size, start_step=start)
    assert [rank[start:] for rank in whole] == resumed


@settings(max_examples=100)
@given(job=JOBS)
def test_each_epoch_sees_every_row_once_the_last_short_batch_included(job):
    job = {**job, "max_steps": None}
    (only,) = by_rank(job, 1)
    assert len(only) == num_steps(
        **{k: job[k] for k in ("num_examples", "epochs", "max_steps", "global_batch_size")}
    )
    for epoch in range(job["epochs"]):
        seen = [i for part in only if part.epoch == epoch for micro in part.micro for i in micro]
        assert sorted(seen) == list(range(job["num_examples"]))
        assert seen == epoch_order(job["num_examples"], seed=job["seed"], epoch=epoch).tolist()


def test_order_depends_on_seed_and_epoch_alone():
    orders = [tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert orders[0] == tuple(epoch_order(50, seed=1, epoch=0))


def test_hand_checked_steps():
    order = epoch_order(10, seed=3, epoch=0).tolist()
    first, second, last = by_rank(
        {"num_examples": 10, "epochs": 1, "max_steps": None, "global_batch_size": 4, "seed": 3}, 2, 1
    )[1]
    assert first.micro == [[order[2]], [order[3]]] and first.samples == [[2], [3]]
    assert second.micro == [[order[6]], [order[7]]] and (second.step, second.epoch) == (1, 0)
    assert last.micro == [[order[9]]] and last.samples == [[1]]


def test_rank_without_rows_still_has_its_micro_batches():
    job = {"num_examples": 5, "epochs": 1, "max_steps": None, "global_batch_size": 4, "seed": 0}
    three = by_rank(job, 3, 2)
    assert [len(rank[1].micro) for rank in three] == [1, 1, 1]
    assert [len(rank[1].micro[0]) for rank in three] == [1, 0, 0]


def test_max_steps_stops_and_a_start_past_the_end_yields_nothing():
    job = {"num_examples": 10, "epochs": 5, "max_steps": 3, "global_batch_size": 4, "seed": 0}
    assert len(by_rank(job, 1)[0]) == 3
    assert by_rank(job, 1, start_step=3) == [[]]


@pytest.mark.parametrize(
    ("examples", "rank", "message"), [(5, 2, "rank 2 is not one of 2"), (0, 0, "no examples")]
)
def test_impossible_arguments(examples, rank, message):
    with pytest.raises(ValueError, match=message):
        next(
            steps(
                examples,
                epochs=1,
                max_steps=None,
                global_batch_size=4,
                micro_batch_size=1,
                world_size=2,
                rank=rank,
                seed=0,
            )
        )


def test_shares_are_contiguous_and_even():
    assert [share(10, 4, rank) for rank in range(4)] == [(0, 3), (3, 6), (6, 8), (8, 10)]


def test_collate_pads_on_the_right():
    def example(ids, labels):
        return Example(ids, labels, 0, "00", "", "")

    batch = collate([example([5, 6, 7], [IGNORED, 6, 7]), example([8], [8])], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert {name: tuple(tensor.shape) for name, tensor in collate([], 2).items()} == {
        "input_ids": (0, 1),
        "labels": (0, 1),
        "attention_mask": (0, 1),
    }
