"""Claims about which rows a step sees."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from emtrain.order import row_order


@given(rows=st.integers(1, 50), batch_size=st.integers(1, 16), steps=st.integers(1, 30), seed=st.integers(0, 5))
def test_rows_are_seen_equally_often_give_or_take_the_last_epoch(
    rows: int, batch_size: int, steps: int, seed: int
) -> None:
    order = row_order(rows, batch_size=batch_size, total_steps=steps, seed=seed)
    assert order.shape == (steps, batch_size)
    counts = np.bincount(order.flatten(), minlength=rows)
    assert counts.max() - counts.min() <= 1


def test_each_epoch_is_shuffled_anew_and_each_seed_differently() -> None:
    first, second = row_order(100, batch_size=100, total_steps=2, seed=0)
    other = row_order(100, batch_size=100, total_steps=1, seed=1)[0]
    assert (first != second).any()
    assert (first != other).any()
    assert sorted(first) == list(range(100))


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    short = row_order(7, batch_size=3, total_steps=4, seed=3)
    long = row_order(7, batch_size=3, total_steps=9, seed=3)
    np.testing.assert_array_equal(long[:4], short)
