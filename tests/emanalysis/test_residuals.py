import numpy as np
import pytest
from scipy import stats

from emanalysis.residuals import residual_from_curve


@pytest.fixture
def cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses and scores of 24 cells of which every third is 6 points above a line in log loss."""
    rng = np.random.default_rng(0)
    loss, tested = np.geomspace(1, 1.5, 24), np.arange(24) % 3 == 1
    return loss, 100 * np.log(loss) + 6 * tested + rng.normal(0, 1, 24), tested


def test_finds_how_far_the_tested_cells_lie_above_the_others(
    cells: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    residual = residual_from_curve(*cells, rng=np.random.default_rng(1))
    low, high = residual.interval()
    assert low < 6 < high
    assert residual.estimate == pytest.approx(6, abs=1)
    assert residual.p < 1e-6
    assert (residual.cells, residual.outside) == (8, 0)


def test_on_a_flat_curve_it_is_about_the_two_sample_t_test(
    cells: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """A curve held flat by a falling trend is the mean of the others; its error is the mean's."""
    loss, _, tested = cells
    score = 50 - 30 * np.log(loss) + np.random.default_rng(2).normal(0, 2, 24)
    residual = residual_from_curve(loss, score, tested, rng=np.random.default_rng(1), draws=1000)
    expected = stats.ttest_ind(score[tested], score[~tested])
    assert residual.estimate == pytest.approx(score[tested].mean() - score[~tested].mean())
    assert residual.degrees_of_freedom == expected.df
    # Redrawn residuals tilt the curve a little, which the mean does not know of.
    assert residual.error == pytest.approx(residual.estimate / expected.statistic, rel=0.15)


def test_cells_beyond_the_curve_are_left_out_and_counted() -> None:
    loss = np.array([1.0, 1.1, 1.2, 1.3, 1.05, 1.25, 1.9])
    tested = np.array([False] * 4 + [True] * 3)
    residual = residual_from_curve(loss, 10 * loss + tested, tested, rng=np.random.default_rng(0))
    assert (residual.cells, residual.outside) == (2, 1)


@pytest.mark.parametrize(
    ("tested", "reason"),
    [([1, 2, 3, 4], "at least 4 cells of different loss, not 3"), ([0], "at least 2 cells in the curve's range")],
)
def test_says_what_is_missing(tested: list[int], reason: str) -> None:
    loss = np.linspace(1, 2, 7)
    with pytest.raises(ValueError, match=reason):
        residual_from_curve(loss, loss, np.isin(np.arange(7), tested), rng=np.random.default_rng(0))
