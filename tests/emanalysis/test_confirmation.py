from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from emanalysis.confirmation import (
    Choice,
    choose,
    choosing_clusters,
    choosing_seeds,
    confirm,
    confirmable,
    held_back,
    split,
)
from emanalysis.loss_curve import fit_loss_curve
from emanalysis.score_matrix import ScoreMatrix


@pytest.fixture
def matrix() -> ScoreMatrix:
    """4 cells x 6 seeds, 8 topics x 3 questions; the seeds of a cell are in no order."""
    rng = np.random.default_rng(0)
    cell, seed = np.repeat(np.arange(4), 6), np.concatenate([rng.permutation(6) for _ in range(4)])
    scores = rng.normal(50, 10, (24, 24))
    return ScoreMatrix(
        scores=scores,
        response_sd=np.full(scores.shape, np.nan),
        responses=np.ones(scores.shape),
        loss=1 + 0.1 * cell + rng.normal(0, 0.01, 24),
        cell=cell,
        seed=seed,
        cluster=np.repeat(np.arange(8), 3),
    )


def test_the_halves_share_no_seed_and_no_topic(matrix: ScoreMatrix) -> None:
    choosing, confirming = split(matrix, rng=np.random.default_rng(0))
    assert sorted(set(choosing.seed)) == [0, 1]
    assert sorted(set(confirming.seed)) == [2, 3, 4, 5]
    assert choosing.scores.shape == (4 * 2, 4 * 3)
    assert confirming.scores.shape == (4 * 4, 4 * 3)
    columns = {tuple(np.sort(column)) for column in matrix.scores[np.isin(matrix.seed, [0, 1])].T}
    chosen = {tuple(np.sort(column)) for column in choosing.scores.T}
    assert len(chosen & columns) == 12


@pytest.mark.parametrize(("seeds", "choosing"), [(3, 1), (5, 1), (6, 2), (10, 3)])
def test_a_third_of_the_seeds_and_half_of_the_topics_choose(seeds: int, choosing: int) -> None:
    assert choosing_seeds(seeds) == choosing
    assert [choosing_clusters(n) for n in (3, 4, 9)] == [1, 2, 4]


def test_too_little_to_split_is_refused_with_the_reason(matrix: ScoreMatrix) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="it takes at least 3 seeds of a configuration, and one has fewer"):
        split(matrix.take(runs=(matrix.cell != 1) | (matrix.seed < 2)), rng=rng)
    with pytest.raises(ValueError, match="at least 3 groups of questions, and there are 2"):
        split(matrix.take(questions=matrix.cluster < 2), rng=rng)


def test_seeds_that_a_search_went_by_only_choose_and_those_of_its_confirmation_confirm(matrix: ScoreMatrix) -> None:
    """Cells 0 and 1 were searched and confirmed, cell 2 was searched alone, cell 3 won in another sweep's search."""
    of_search = np.isin(matrix.seed, [0, 1]) & (matrix.cell != 3) | (matrix.cell == 2)
    searched = replace(matrix, unsearched=~of_search)
    assert [sorted(searched.seed[held_back(searched) & (searched.cell == cell)]) for cell in range(4)] == [
        [2, 3, 4, 5],
        [2, 3, 4, 5],
        [],
        [2, 3, 4, 5],  # two of its six choose
    ]
    assert confirmable(searched).tolist() == [True, True, False, True]
    with pytest.raises(ValueError, match="at least 2 seeds of a configuration that the search has not seen"):
        split(searched, rng=np.random.default_rng(0))
    confirmed = searched.take(runs=(searched.cell < 2) & (searched.seed < 4))
    choosing, confirming = split(confirmed, rng=np.random.default_rng(0))
    assert sorted(choosing.seed) == [0, 0, 1, 1]
    assert sorted(confirming.seed) == [2, 2, 3, 3]


def test_the_choice_is_the_largest_gap_at_no_more_loss(matrix: ScoreMatrix) -> None:
    better = replace(matrix, scores=matrix.scores + 30 * (matrix.cell == 1)[:, None] + 40 * (matrix.cell == 3)[:, None])
    choice = choose(better)
    score = better.cell_mean(better.run_score)
    assert (choice.better, choice.worse) == (1, 2)
    assert choice.gap == pytest.approx(score[1] - score[2])


def test_without_luck_of_questions_it_is_welchs_test_over_held_back_runs(matrix: ScoreMatrix) -> None:
    run_means = np.random.default_rng(1).normal(50, 5, 24)
    flat = replace(matrix, scores=np.repeat(run_means[:, None], 24, axis=1))
    choice = Choice(0, 2, np.nan, fit_loss_curve(np.array([1.0, 2.0]), np.array([50.0, 50.0])))
    tested = confirm(flat, choice)
    a, b = run_means[:6], run_means[12:18]
    expected = stats.ttest_ind(a, b, equal_var=False, alternative="greater")
    assert tested.score.p_greater == pytest.approx(expected.pvalue)
    assert tested.p == pytest.approx(expected.pvalue)
    losses = stats.ttest_ind(flat.loss[:6], flat.loss[12:18], equal_var=False).confidence_interval(0.9)
    assert tested.loss_interval == pytest.approx((losses.low, losses.high))


def test_a_gain_that_the_loss_explains_is_not_confirmed(matrix: ScoreMatrix) -> None:
    """Cell 1 has more loss than cell 0, and the score is 100 points per unit of log loss."""
    explained = replace(matrix, scores=matrix.scores / 20 + 100 * np.log(matrix.loss)[:, None])
    curve = fit_loss_curve(np.array([0.9, 1.5]), 100 * np.log([0.9, 1.5]))
    tested = confirm(explained, Choice(1, 0, np.nan, curve))
    assert tested.score.p_greater < 0.001
    assert tested.beyond_loss.p_greater > 0.05
    assert tested.p == tested.beyond_loss.p_greater
    assert tested.loss == pytest.approx(0.1, abs=0.02)
    assert not tested.no_more_loss
