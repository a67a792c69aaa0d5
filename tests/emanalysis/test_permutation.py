import itertools

import numpy as np
import pytest

from emanalysis.loss_curve import fit_loss_curve
from emanalysis.permutation import loss_bins, max_test


def test_bins_hold_neighbours_in_loss_in_equal_numbers() -> None:
    assert loss_bins(np.array([5.0, 1, 4, 2, 3, 6, 7]), 3).tolist() == [1, 0, 0, 0, 0, 1, 1]


def test_p_is_the_share_of_arrangements_with_as_large_a_difference() -> None:
    """All 6! / (2! 2! 2!) = 90 arrangements by hand, at one flat level of loss so that the curve is a constant."""
    loss = np.array([1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
    score = np.array([62.0, 55.0, 50.0, 46.0, 40.0, 38.0])
    label = np.array([0, 0, 1, 2, 1, 2])
    residual = score - fit_loss_curve(loss, score)(loss)
    assert residual == pytest.approx(score - score.mean())

    def spread(order: tuple[int, ...]) -> float:
        moved = score.mean() + residual[list(order)]
        left = moved - fit_loss_curve(loss, moved)(loss)
        return float(np.ptp([left[label == own].mean() for own in range(3)]) / np.sqrt(np.mean(left**2)))

    every = [spread(order) for order in itertools.permutations(range(6))]
    exact = np.mean(np.array(every) >= spread(tuple(range(6))) - 1e-9)
    test = max_test(loss, score, label, np.zeros(6, int), rng=np.random.default_rng(0), permutations=4000)
    assert test.p == pytest.approx(exact, abs=0.02)
    assert test.difference == pytest.approx(np.ptp([58.5, 45.0, 42.0]))
    assert (test.units, test.bins) == (6, 1)


def test_a_label_that_matters_at_every_loss_is_seen() -> None:
    rng = np.random.default_rng(0)
    loss, label = np.sort(rng.uniform(1, 2, 30)), np.arange(30) % 3
    score = 30 * np.log(loss) + 3 * (label == 1) + rng.normal(0, 0.5, 30)
    test = max_test(loss, score, label, loss_bins(loss, 6), rng=rng, permutations=500)
    assert test.p == 1 / 501
    assert test.difference == pytest.approx(3, abs=0.6)
    assert test.null_95 < test.difference


def test_a_label_tied_to_the_loss_can_not_be_tested() -> None:
    loss = np.array([1.0, 1.1, 2.0, 2.1])
    with pytest.raises(ValueError, match="no loss bin holds two labels"):
        max_test(loss, loss, np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), rng=np.random.default_rng(0))
