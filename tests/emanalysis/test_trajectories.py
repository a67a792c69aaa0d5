import numpy as np
import pytest
from scipy import stats

from emanalysis.trajectories import common_levels, compare_at_levels, score_at_losses


def test_score_is_read_off_where_the_loss_first_came_down() -> None:
    """Loss 4, 2, 3, 1: the rise to 3 is passed over. At sqrt(8), halfway in log from 4 to 2: (90 + 70) / 2."""
    score = score_at_losses(
        np.array([4.0, 2.0, 3.0, 1.0]), np.array([90.0, 70.0, 0.0, 50.0]), np.array([4, np.sqrt(8), 2, 1, 0.5, 5])
    )
    assert score == pytest.approx([90, 80, 70, 50, np.nan, np.nan], nan_ok=True)


def test_levels_are_those_that_every_run_crosses() -> None:
    levels = common_levels([np.array([4.0, 1.0]), np.array([3.0, 3.5, 1.5])], count=3)
    assert levels == pytest.approx([1.5, np.sqrt(4.5), 3.0])
    with pytest.raises(ValueError, match="no loss is crossed by every run"):
        common_levels([np.array([4.0, 3.0]), np.array([2.0, 1.0])])


def test_levels_are_tested_by_alexander_and_govern() -> None:
    rng = np.random.default_rng(0)
    cell = np.array([0, 0, 0, 1, 1, 1, 1])
    scores = rng.normal(50, 5, (7, 2))
    first, _ = compare_at_levels(scores, cell, np.array([1.0, 2.0]))
    a, b = scores[:3, 0], scores[3:, 0]
    assert first.p == pytest.approx(stats.alexandergovern(a, b).pvalue)
    assert first.mean == pytest.approx([a.mean(), b.mean()])
    assert first.error == pytest.approx([stats.sem(a), stats.sem(b)])


def test_single_runs_have_a_mean_and_no_test() -> None:
    (level,) = compare_at_levels(np.array([[1.0], [2.0], [4.0]]), np.array([0, 1, 1]), np.array([1.0]))
    assert level.mean.tolist() == [1.0, 3.0]
    assert level.error == pytest.approx([np.nan, 1.0], nan_ok=True)
    assert np.isnan(level.p)
