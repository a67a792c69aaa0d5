import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emanalysis.pareto import membership, pareto_front

runs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=10)


@given(runs)
def test_holds_exactly_the_runs_that_no_run_beats(points: list[tuple[int, int]]) -> None:
    loss, score = np.array(points, float).T
    expected = [
        not any(
            other <= own and more >= mine and (other < own or more > mine)
            for other, more in zip(loss, score, strict=True)
        )
        for own, mine in zip(loss, score, strict=True)
    ]
    assert pareto_front(loss, score[None, :])[0].tolist() == expected


def test_membership_is_the_share_of_draws() -> None:
    draws = np.array([[1.0, 2, 3], [1, 0, 3], [4, 2, 3], [1, 1, 1]])
    assert membership(np.array([1.0, 2, 3]), draws) == pytest.approx([1.0, 1 / 4, 2 / 4])
