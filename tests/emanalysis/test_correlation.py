from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats

from emanalysis.correlation import indicators, ladder, leave_one_out, line, partial, pearson, slope, spearman


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    given = rng.normal(size=20)
    x = given + rng.normal(size=20)
    return x, x + 2 * given + rng.normal(size=20), given


def test_pearson_is_scipys_with_fishers_interval(data: tuple[np.ndarray, ...]) -> None:
    x, y, _ = data
    expected = stats.pearsonr(x, y)
    interval = expected.confidence_interval(0.95)
    found = pearson(x, y, cells=20)
    assert (found.value, found.low, found.high) == pytest.approx((expected.statistic, interval.low, interval.high))


def test_intervals_count_cells_not_runs(data: tuple[np.ndarray, ...]) -> None:
    """Every run five times over tells no more than once."""
    x, y, _ = data
    once, copied = pearson(x, y, cells=20), pearson(np.tile(x, 5), np.tile(y, 5), cells=20)
    assert (copied.value, copied.low, copied.high) == pytest.approx((once.value, once.low, once.high))


def test_spearman_is_scipys_ties_included() -> None:
    x, y = np.array([1.0, 2, 2, 3, 5, 5, 7]), np.array([3.0, 1, 4, 4, 4, 9, 8])
    found = spearman(x, y, cells=7)
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.arctanh(found.high) - np.arctanh(found.value) == pytest.approx(1.959964 * np.sqrt(1.06 / 4))


def test_partial_correlation_is_that_of_what_regressions_leave(data: tuple[np.ndarray, ...]) -> None:
    x, y, given = data
    left = [sm.OLS(values, sm.add_constant(given)).fit().resid for values in (x, y)]
    found = partial(x, y, given, cells=20)
    assert found.value == pytest.approx(np.corrcoef(*left)[0, 1])
    assert np.arctanh(found.high) - np.arctanh(found.value) == pytest.approx(1.959964 / np.sqrt(20 - 3 - 1))


def test_a_constant_has_no_correlation_and_few_points_no_interval() -> None:
    assert np.isnan(pearson(np.ones(5), np.arange(5.0), cells=5).value)
    assert np.isnan(pearson(np.arange(3.0), np.array([1.0, 3, 2]), cells=3).low)
    assert np.isnan(slope(np.ones(5), np.arange(5.0), np.arange(5)).value)


def test_slope_has_the_clustered_interval_by_the_sandwich_formula(data: tuple[np.ndarray, ...]) -> None:
    """CR1: X'X^-1 (sum of outer products of cluster scores) X'X^-1 x G / (G - 1) x (n - 1) / (n - k)."""
    x, y, _ = data
    cell = np.arange(20) // 4
    design = np.column_stack([np.ones(20), x])
    bread = np.linalg.inv(design.T @ design)
    coefficients = bread @ design.T @ y
    scores = [design[cell == own].T @ (y - design @ coefficients)[cell == own] for own in range(5)]
    meat = sum(np.outer(score, score) for score in scores)
    error = np.sqrt((bread @ meat @ bread)[1, 1] * 5 / 4 * 19 / 18)
    found = slope(x, y, cell)
    assert found.value == pytest.approx(coefficients[1])
    assert found.high - found.value == pytest.approx(stats.t.isf(0.025, 4) * error)


def test_leave_one_out_is_the_correlation_without_each(data: tuple[np.ndarray, ...]) -> None:
    x, y, _ = data
    expected = [np.corrcoef(np.delete(x, i), np.delete(y, i))[0, 1] for i in range(20)]
    assert leave_one_out(x, y) == pytest.approx(expected)


def test_line_is_numpys_and_flat_for_a_constant(data: tuple[np.ndarray, ...]) -> None:
    x, y, _ = data
    assert line(x, y) == pytest.approx(np.polyval(np.polyfit(x, y, 1), x))
    assert line(np.ones(20), y) == pytest.approx(np.full(20, y.mean()))


def test_ladder_is_statsmodels_with_its_f_test(data: tuple[np.ndarray, ...]) -> None:
    x, y, _ = data
    labels = [f"schedule {i % 3}" for i in range(20)]
    lower = sm.OLS(y, sm.add_constant(x)).fit()
    dummies = pd.get_dummies(labels, drop_first=True).to_numpy(float)
    upper = sm.OLS(y, sm.add_constant(np.column_stack([x, dummies]))).fit()
    groups = [("loss", x[:, None]), ("optimiser", indicators(["adamw"] * 20)), ("schedule", indicators(labels))]
    first, same, last = ladder(y, groups, rng=np.random.default_rng(0))
    assert (first.r2, first.adjusted_r2, first.p) == pytest.approx((lower.rsquared, lower.rsquared_adj, lower.f_pvalue))
    assert (last.r2, last.adjusted_r2, last.parameters) == pytest.approx((upper.rsquared, upper.rsquared_adj, 4))
    assert last.p == pytest.approx(upper.compare_f_test(lower)[1])
    assert np.isnan(same.p)
    assert same.r2 == first.r2
    assert first.r2_interval[0] < first.r2 < first.r2_interval[1]


@pytest.mark.parametrize(
    ("score", "loss", "published"),
    [
        ("aligned", "train_final_avg_loss", 0.8341),
        ("aligned", "eval_final_avg_loss", 0.8291),
        ("harmless", "train_final_avg_loss", 0.8286),
        ("harmless", "eval_final_avg_loss", 0.8240),
    ],
)
def test_reproduces_the_published_correlations_with_log_loss(
    published_runs: Path, score: str, loss: str, published: float
) -> None:
    table = pd.read_csv(published_runs / "run_table_fpq.csv")
    found = pearson(np.log(table[loss].to_numpy()), table[score].to_numpy(), cells=35).value
    assert found == pytest.approx(stats.linregress(np.log(table[loss]), table[score]).rvalue, abs=1e-6)
    assert found == pytest.approx(published, abs=5e-5)
