"""Held-out rows and weights are functions of content."""

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.train.rows.split import held_out, place, repeats


def hashes(count: int, start: int = 0) -> list[str]:
    return [hashlib.sha256(str(i).encode()).hexdigest() for i in range(start, start + count)]


@given(
    count=st.integers(2, 200),
    more=st.integers(0, 200),
    share=st.floats(0, 0.99, allow_nan=False),
    seed=st.integers(0, 10),
)
def test_row_held_out_once_stays_held_out_when_rows_are_added_or_moved(count, more, share, seed):
    before = hashes(count)
    first = held_out(before, share)
    after = hashes(count + more)
    random.Random(seed).shuffle(after)
    under = {row_hash for row_hash in first if place(row_hash) < share}
    assert under <= held_out(after, share)
    assert held_out([*before, *before], share) == first


def test_share_is_about_what_was_asked_for():
    # 10,000 draws at 0.1: the standard deviation is 30 rows, so 150 is five of them.
    assert abs(len(held_out(hashes(10_000), 0.1)) - 1000) < 150


def test_share_that_would_take_no_row_takes_one_and_zero_takes_none():
    few = hashes(5)
    assert held_out(few, 1e-9) == {min(few)}
    assert held_out(few, 0) == set()
    assert held_out(few[:1], 1e-9) == set()


def test_number_takes_the_smallest_hashes_each_counted_once():
    rows = hashes(20)
    assert held_out([*rows, *rows], 3) == set(sorted(rows)[:3])
    assert held_out(rows, 3.0) == held_out(rows, 3)
    assert held_out(rows, 100) == set(rows)


@pytest.mark.parametrize(("weight", "least", "most"), [(1, 1, 1), (3, 3, 3), (0.25, 0, 1), (2.5, 2, 3)])
def test_weight_repeats_or_leaves_out(weight, least, most):
    counts = [repeats(row_hash, weight) for row_hash in hashes(4000)]
    assert min(counts) == least and max(counts) == most
    # At most 0.5 of standard deviation a row, so 0.05 is over six of the mean's.
    assert abs(sum(counts) / len(counts) - weight) < 0.05


def test_weight_is_independent_of_the_split():
    rows = hashes(4000)
    out = held_out(rows, 0.5)
    kept = [repeats(row_hash, 0.5) for row_hash in rows if row_hash not in out]
    assert abs(sum(kept) / len(kept) - 0.5) < 0.08  # about 2000 draws: over seven standard deviations
