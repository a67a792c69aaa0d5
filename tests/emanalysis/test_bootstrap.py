import numpy as np
import pytest

from emanalysis.bootstrap import cell_draws, percentile_interval, run_draws
from emanalysis.matched_pairs import cell_moments, differences
from emanalysis.score_matrix import ScoreMatrix


def sweep(*, seeds: int, response_sd: float = 0.0, cells: int = 2, questions: int = 40) -> ScoreMatrix:
    rng = np.random.default_rng(3)
    cell = np.repeat(np.arange(cells), seeds)
    scores = 50 + rng.normal(0, 20, questions) + rng.normal(0, 4, (cells * seeds, 1))
    scores = scores + rng.normal(0, 6, (cells, questions))[cell]
    return ScoreMatrix(
        scores=scores,
        response_sd=np.full(scores.shape, response_sd),
        responses=np.full(scores.shape, 4.0),
        loss=np.ones(cells * seeds),
        cell=cell,
        seed=np.tile(np.arange(seeds), cells),
        cluster=np.arange(questions),
    )


def test_a_runs_error_over_questions_is_the_standard_error_of_their_mean() -> None:
    matrix = sweep(seeds=1)
    drawn = run_draws(matrix, rng=np.random.default_rng(0), draws=4000)
    assert drawn.mean(axis=0) == pytest.approx(matrix.run_score, abs=0.2)
    assert drawn.std(axis=0) == pytest.approx(matrix.scores.std(axis=1) / np.sqrt(40), rel=0.05)


def test_responses_add_their_own_error() -> None:
    """40 questions, 4 responses of SD 60 each: 60 / sqrt(160) = 4.74, of which redrawn questions repeat some twice."""
    still, noisy = (
        run_draws(sweep(seeds=1, response_sd=sd), rng=np.random.default_rng(0), draws=4000).var(axis=0)
        for sd in (0.0, 60.0)
    )
    # A question drawn k times counts k times, with one and the same new mean: E[k^2] = 2 - 1 / 40.
    assert noisy - still == pytest.approx(np.full(2, 60**2 / 160 * (2 - 1 / 40)), rel=0.1)


def test_runs_share_the_questions_of_a_draw() -> None:
    matrix = sweep(seeds=1)
    drawn = run_draws(matrix, rng=np.random.default_rng(0), draws=4000)
    paired = (matrix.scores[0] - matrix.scores[1]).std() / np.sqrt(40)
    assert (drawn[:, 0] - drawn[:, 1]).std() == pytest.approx(paired, rel=0.05)


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_the_error_of_a_difference_is_that_of_the_variance_components_for_few_seeds_too(seeds: int) -> None:
    matrix = sweep(seeds=seeds)
    drawn = cell_draws(matrix, rng=np.random.default_rng(0), draws=6000)
    moments = cell_moments(matrix)
    expected = differences(moments, 0, 1).error
    assert (drawn[:, 0] - drawn[:, 1]).std() == pytest.approx(expected, rel=0.05)


def test_percentile_interval_cuts_off_equal_tails() -> None:
    low, high = percentile_interval(np.linspace(0, 100, 101)[:, None], level=0.9)
    assert (low[0], high[0]) == pytest.approx((5, 95))
