import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from emanalysis.matched_pairs import cell_moments, differences, ordered_pairs, question_variance
from emanalysis.score_matrix import ScoreMatrix


def matrix(scores: np.ndarray, cell: list[int], cluster: list[int] | None = None) -> ScoreMatrix:
    runs, questions = scores.shape
    return ScoreMatrix(
        scores=scores,
        response_sd=np.zeros(scores.shape),
        responses=np.ones(scores.shape),
        loss=np.linspace(1, 2, runs),
        cell=np.array(cell),
        seed=np.arange(runs),
        cluster=np.arange(questions) if cluster is None else np.array(cluster),
    )


@pytest.fixture
def noise() -> Callable[..., np.ndarray]:
    rng = np.random.default_rng(1)
    return lambda *shape: rng.normal(50, 10, shape)


def test_one_run_a_cell_is_the_paired_t_test_over_questions(noise: Callable[..., np.ndarray]) -> None:
    scores = noise(2, 9)
    gap = differences(cell_moments(matrix(scores, [0, 1])), 0, 1)
    expected = stats.ttest_rel(*scores, alternative="greater")
    assert gap.p_greater == pytest.approx(expected.pvalue)
    assert gap.degrees_of_freedom == expected.df
    interval = stats.ttest_rel(*scores).confidence_interval(0.9)
    assert gap.bounds(0.9) == pytest.approx((interval.low, interval.high))
    assert gap.p_equivalent(12.0) == pytest.approx(ttost_paired(*scores, -12, 12)[0])


def test_without_differences_between_questions_it_is_welch_over_runs(noise: Callable[..., np.ndarray]) -> None:
    run_means = noise(7)
    scores = np.repeat(run_means[:, None], 5, axis=1)
    gap = differences(cell_moments(matrix(scores, [0] * 4 + [1] * 3)), 0, 1)
    a, b = run_means[:4], run_means[4:]
    expected = stats.ttest_ind(a, b, equal_var=False, alternative="greater")
    assert gap.p_greater == pytest.approx(expected.pvalue)
    assert gap.degrees_of_freedom == pytest.approx(expected.df)
    assert gap.p_equivalent(8.0) == pytest.approx(ttost_ind(a, b, -8, 8, usevar="unequal")[0])


def test_clusters_of_equal_size_count_as_one_question_each(noise: Callable[..., np.ndarray]) -> None:
    scores = noise(2, 6, 3)
    clustered = matrix(scores.reshape(2, 18), [0, 1], np.repeat(np.arange(6), 3).tolist())
    gap = differences(cell_moments(clustered), 0, 1)
    assert gap.p_greater == pytest.approx(stats.ttest_rel(*scores.mean(axis=2), alternative="greater").pvalue)


def test_variance_components_by_hand() -> None:
    """Two runs, two questions: A = [[10, 20], [14, 28]], B = [[5, 9], [5, 9]] without any noise.

    Run means of A are 15 and 21: seeds 18 / 2 = 9. Question means of A - B are 12 - 5 = 7 and 24 - 9 = 15: questions
    32 / 2 = 16. Residuals of A are -+1: residual mean square 4 / 1, over two questions and two runs 1.
    Variance 9 + (16 - 1) = 24.
    """
    gap = differences(cell_moments(matrix(np.array([[10.0, 20], [14, 28], [5, 9], [5, 9]]), [0, 0, 1, 1])), 0, 1)
    assert gap.estimate == 11
    assert gap.error**2 == pytest.approx(24)
    assert gap.degrees_of_freedom == pytest.approx(24**2 / (9**2 + 16**2 + 1**2))


def test_the_error_covers_luck_of_seeds_and_of_questions() -> None:
    """The mean estimated variance is that of the differences between sweeps, each with new seeds and questions."""
    rng = np.random.default_rng(2)
    seeds, questions, estimates, variances = 4, 10, [], []
    cell = [0] * seeds + [1] * seeds
    for _ in range(1500):
        interaction = rng.normal(0, 6, (2, questions))[cell]
        scores = 50 + interaction + rng.normal(0, 3, (2 * seeds, 1)) + rng.normal(0, 5, (2 * seeds, questions))
        gap = differences(cell_moments(matrix(scores, cell)), 0, 1)
        estimates.append(gap.estimate)
        variances.append(gap.error**2)
    truth = 2 * (3**2 / seeds + 6**2 / questions + 5**2 / (seeds * questions))
    assert np.mean(variances) == pytest.approx(truth, rel=0.05)
    assert np.var(estimates) == pytest.approx(truth, rel=0.1)


def test_a_sure_difference_has_p_zero_and_none_at_all_says_nothing() -> None:
    moments = cell_moments(matrix(np.full((2, 3), 100.0) - [[0], [1]], [0, 1]))
    assert differences(moments, [0, 1, 0], [1, 0, 0]).p_greater == pytest.approx([0.0, 1.0, 0.5])


def test_ordered_pairs_have_no_more_loss_on_the_left() -> None:
    loss = np.array([1.0, 3.0, 1.0])
    assert set(zip(*ordered_pairs(loss), strict=True)) == {(0, 1), (2, 1), (0, 2), (2, 0)}
    assert len(ordered_pairs(loss, 2.0)[0]) == 6


def test_question_variance_is_half_the_squared_distance_of_neighbours(noise: Callable[..., np.ndarray]) -> None:
    scores = noise(3, 8)
    single = matrix(scores, [0, 1, 2])
    expected = np.mean([np.var(scores[1] - scores[0], ddof=1), np.var(scores[2] - scores[1], ddof=1)]) / 2 / 8
    assert question_variance(cell_moments(single), single.loss) == pytest.approx(expected)


def test_published_runs_have_the_known_pair_and_number_of_discoveries(published_runs: Path) -> None:
    """Two-sided, questions independent: the best pair has SE 3.4 and p 1.4e-5, and of the better-aligned ones at no
    more loss 37 of 595 pass Benjamini-Hochberg, all ordered pairs being tested."""
    details = [json.loads(file.read_text()) for file in sorted((published_runs / "fpq").glob("*.json"))]
    aligned = [[row["aligned"] for _, row in sorted(detail["summ_by_q"].items())] for detail in details]
    loss = np.array([detail["eval_loss"]["avg_loss"] for detail in details])
    moments = cell_moments(matrix(np.array(aligned), list(range(len(loss)))))
    a, b = ordered_pairs(loss)
    gaps = differences(moments, a, b)
    two_sided = 2 * np.minimum(gaps.p_greater, 1 - gaps.p_greater)
    best = np.where(gaps.estimate > 0, two_sided, 1).argmin()
    assert len(a) == 595
    assert gaps.estimate[best] == pytest.approx(18.8233, abs=1e-4)
    assert gaps.error[best] == pytest.approx(3.4, abs=0.05)
    assert two_sided[best] == pytest.approx(1.4e-5, rel=0.02)
    discoveries = (stats.false_discovery_control(two_sided) <= 0.05) & (gaps.estimate > 0)
    assert np.count_nonzero(discoveries) == 37
    errors = differences(moments, *np.array(list(itertools.combinations(range(35), 2))).T).error
    assert np.median(errors) == pytest.approx(2.8, abs=0.05)
