"""Barriers of curves whose barriers are known."""

import numpy as np
import pytest

from emanalysis.line_barrier import alignment_barrier, barrier, excess, loss_barrier
from emanalysis.score_matrix import ScoreMatrix

T = np.array([0, 0.25, 0.5, 0.75, 1])


def test_a_barrier_is_the_largest_excess_over_the_line_between_the_ends() -> None:
    """Ends 1 and 2; halfway the straight line is at 1.5."""
    values = np.array([1, 1.5, 2.5, 1.75, 2])
    assert excess(T, values) == pytest.approx([0, 0.25, 1, 0, 0])
    found = barrier(T, values, np.tile(values, (10, 1)))
    assert (found.height, found.at, found.middle) == (1, 0.5, 1)
    assert (found.low, found.high) == (1, 1)


def test_a_straight_or_sagging_line_has_no_barrier() -> None:
    for values in (np.array([1, 1.25, 1.5, 1.75, 2]), np.array([1, 0.5, 0.2, 0.5, 1])):
        found = barrier(T, values, np.tile(values, (10, 1)))
        assert found.height == 0
        assert np.isnan(found.at)


def test_a_line_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"points from 0 to 0\.75"):
        barrier(T[:-1], np.ones(4), np.ones((3, 4)))


def test_a_loss_barrier_weighs_rows_by_their_tokens() -> None:
    """Halfway row 0 (1 token) gains 3 nats, row 1 (3 tokens) nothing: 3 of 4 tokens' worth."""
    losses = np.array([[1.0, 3.0], [4.0, 3.0], [1.0, 3.0]])
    found = loss_barrier(np.array([0, 0.5, 1]), losses, np.array([1.0, 3.0]), rng=np.random.default_rng(0))
    assert found.height == pytest.approx(3 / 4)
    assert (found.low, found.high) == (0, pytest.approx(3))  # one row drawn twice, or the other


def test_the_interval_of_a_quadratic_valley_of_noisy_rows_holds_its_barrier() -> None:
    """Each row's loss is c t (1 - t) with its own c around 2: the barrier is c / 4 at t = 0.5."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        curvature = rng.normal(2, 1, 60)
        losses = 3 + (T * (1 - T))[:, None] * curvature + rng.normal(0, 1, 60)
        found = loss_barrier(T, losses, np.ones(60), rng=rng)
        covered += found.low <= 0.5 <= found.high
    assert covered / 200 >= 0.9


def test_a_fall_of_alignment_is_a_barrier_with_the_noise_of_questions_and_responses() -> None:
    rng = np.random.default_rng(2)
    level = np.array([80.0, 60, 50, 65, 90])
    points = ScoreMatrix(
        scores=level[:, None] + rng.normal(0, 4, 40) + rng.normal(0, 1, (5, 40)),
        response_sd=np.full((5, 40), 2.0),
        responses=np.full((5, 40), 4.0),
        loss=np.ones(5),
        cell=np.arange(5),
        seed=np.zeros(5, np.int64),
        cluster=np.arange(40),
    )
    found = alignment_barrier(T, points, rng=rng)
    assert found.height == pytest.approx(35, abs=1)
    assert found.at == 0.5
    assert found.middle_low < 35 < found.middle_high < found.middle_low + 3
