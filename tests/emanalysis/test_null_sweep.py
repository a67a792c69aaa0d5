import numpy as np
import pytest

from emanalysis.max_diff import max_diff
from emanalysis.null_sweep import NullReference, null_reference
from emanalysis.score_matrix import ScoreMatrix

QUESTIONS = 20


def runs(loss: np.ndarray, score: np.ndarray, cell: np.ndarray) -> ScoreMatrix:
    """Runs of given means whose questions differ all alike, so that questions bring no luck."""
    scores = score[:, None] + np.linspace(-20, 20, QUESTIONS)
    return ScoreMatrix(
        scores=scores,
        response_sd=np.full(scores.shape, np.nan),
        responses=np.ones(scores.shape),
        loss=loss,
        cell=cell,
        seed=np.arange(len(loss)),
        cluster=np.arange(QUESTIONS),
    )


def null_runs(sd: float, count: int = 12) -> ScoreMatrix:
    z = np.random.default_rng(5).normal(size=count)
    z = (z - z.mean()) / z.std(ddof=1)
    return runs(np.full(count, 1.3), 50 + sd * z, np.zeros(count, int))


@pytest.fixture
def single_seeds() -> ScoreMatrix:
    """30 cells with one run each on a line in log loss, with luck of SD 2 and one cell 30 points above it."""
    loss = np.geomspace(1.2, 1.4, 30)
    score = 50 + 100 * np.log(loss / 1.3) + np.random.default_rng(0).normal(0, 2, 30)
    score[12] += 30
    return runs(loss, score, np.arange(30))


def test_a_gap_far_beyond_luck_has_a_small_p(single_seeds: ScoreMatrix) -> None:
    reference = null_reference(single_seeds, null_runs(2.0), rng=np.random.default_rng(0), simulations=999)
    expected = max_diff(single_seeds.loss, single_seeds.run_score)
    assert reference.observed.value == pytest.approx(expected.value)
    assert reference.observed.better == expected.better == 12
    assert reference.p == (1 + np.count_nonzero(reference.gaps >= expected.value)) / 1000 < 0.02
    assert reference.interval[0] > 0
    assert reference.interval[1] <= reference.observed.value


def test_the_same_gap_is_nothing_where_luck_is_large(single_seeds: ScoreMatrix) -> None:
    reference = null_reference(single_seeds, null_runs(16.0), rng=np.random.default_rng(0), simulations=999)
    assert reference.p > 0.3
    assert reference.interval[0] < 0


def test_error_is_the_scatter_of_the_null_runs(single_seeds: ScoreMatrix) -> None:
    reference = null_reference(single_seeds, null_runs(3.0), rng=np.random.default_rng(0), simulations=99)
    assert reference.error == pytest.approx(np.full(30, 3.0))
    assert reference.degrees_of_freedom == 11


def test_questions_that_differ_between_neighbours_add_their_luck(single_seeds: ScoreMatrix) -> None:
    noisy = single_seeds.scores + np.random.default_rng(1).normal(0, 9, single_seeds.scores.shape)
    sweep = ScoreMatrix(**{**vars(single_seeds), "scores": noisy})
    reference = null_reference(sweep, null_runs(3.0), rng=np.random.default_rng(0), simulations=99)
    assert reference.error == pytest.approx(np.full(30, np.sqrt(9 + 81 / QUESTIONS)), rel=0.1)


def test_detectable_is_the_95_percent_gap_and_the_power_quantile_of_a_pair() -> None:
    reference = NullReference(max_diff([1, 2], [2, 1]), np.linspace(0, 10, 101), (0, 0), np.array([3.0, 3.0]), 9)
    assert reference.detectable(0.05, 0.8) == pytest.approx(9.5 + 0.841621 * 3 * np.sqrt(2))


@pytest.mark.parametrize(("count", "cells"), [(4, 1), (6, 2)])
def test_a_null_sweep_is_one_cell_of_five_or_more(single_seeds: ScoreMatrix, count: int, cells: int) -> None:
    null = null_runs(1.0, count)
    null = ScoreMatrix(**{**vars(null), "cell": np.arange(count) % cells})
    with pytest.raises(ValueError, match=f"this one has {cells} cells and {count} runs"):
        null_reference(single_seeds, null, rng=np.random.default_rng(0))
