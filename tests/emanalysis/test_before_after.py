import numpy as np
import pandas as pd
import pytest
from scipy import stats

from emanalysis.before_after import TESTS, adjusted, compare, question_shift

BEFORE = np.array([90.0, 80.0, 70.0, 60.0, 95.0, 85.0])
SPREAD = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


def test_six_questions_that_all_fell_are_as_significant_as_six_can_be() -> None:
    result = compare(BEFORE, BEFORE - [1, 2, 3, 4, 5, 6], SPREAD, SPREAD)
    # Of the 2^6 sign patterns one has all ranks negative: two-sided p = 2 / 64.
    assert result["mean_shift"] == pytest.approx((-3.5, 2 / 64))
    assert result["spread_shift"] == (0.0, 1.0)


def test_statistics_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(80, 5, 30), rng.normal(70, 15, 30)
    result = compare(before, after, np.full(30, 1.0), np.full(30, 2.0))
    assert set(result) == set(TESTS)
    assert result["distribution"][1] == pytest.approx(stats.kstest(after, before).pvalue)
    # Welch by its formula: difference over the root of the summed squared standard errors.
    t = (after.mean() - before.mean()) / np.sqrt(after.var(ddof=1) / 30 + before.var(ddof=1) / 30)
    assert result["mean_unpaired"][0] == pytest.approx(after.mean() - before.mean())
    welch = stats.ttest_ind_from_stats(
        after.mean(), after.std(ddof=1), 30, before.mean(), before.std(ddof=1), 30, False
    )
    assert welch.statistic == pytest.approx(t)
    assert result["mean_unpaired"][1] == pytest.approx(welch.pvalue)
    # Brown-Forsythe is the one-way analysis of variance of absolute deviations from the medians.
    deviations = [np.abs(values - np.median(values)) for values in (after, before)]
    assert result["spread_of_means"][1] == pytest.approx(stats.f_oneway(*deviations).pvalue)
    assert result["pearson"][0] == pytest.approx(np.corrcoef(before, after)[0, 1])
    ranks = [stats.rankdata(values) for values in (before, after)]
    assert result["spearman"][0] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_questions_without_both_scores_are_left_out() -> None:
    before = np.append(BEFORE, [np.nan, 50.0])
    after = np.append(BEFORE - [1, 2, 3, 4, 5, 6], [0.0, np.nan])
    sds = np.ones(8)
    assert compare(before, after, sds, sds)["mean_shift"] == pytest.approx((-3.5, 2 / 64))


def test_five_questions_are_too_few_to_test() -> None:
    result = compare(BEFORE[:5], BEFORE[:5] - 10, SPREAD[:5], SPREAD[:5])
    assert all(np.isnan(p) for _, p in result.values())


def test_nothing_changed_is_no_evidence_and_no_error() -> None:
    same = np.full(8, 100.0)
    result = compare(same, same, np.zeros(8), np.zeros(8))
    assert result["mean_shift"] == (0.0, 1.0)
    assert np.isnan(result["pearson"][1])
    assert np.isnan(result["mean_unpaired"][1])


def test_adjustment_counts_known_p_values_only() -> None:
    # Benjamini-Hochberg by hand: p_(i) * n / i, then the running minimum from the largest: .04 for all four.
    q = adjusted(pd.Series([0.01, np.nan, 0.02, 0.03, 0.04]))
    assert q.tolist() == pytest.approx([0.04, np.nan, 0.04, 0.04, 0.04], nan_ok=True)
    assert adjusted(pd.Series([np.nan])).isna().all()


def test_the_shift_of_one_question_is_tested_by_welch() -> None:
    after = pd.DataFrame({"aligned": [50.0, 50.0], "aligned_sd": [10.0, 0.0], "n_judged": [5, 5]})
    before = pd.DataFrame({"aligned": [60.0, 60.0], "aligned_sd": [5.0, 0.0], "n_judged": [8, 5]})
    tested = question_shift(after, before)
    expected = stats.ttest_ind_from_stats(50, 10, 5, 60, 5, 8, equal_var=False).pvalue
    assert tested["shift"].tolist() == [-10, -10]
    assert tested["p"].tolist() == pytest.approx([expected, np.nan], nan_ok=True)  # no variance, no test
