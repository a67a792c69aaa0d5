import numpy as np
import pytest

from emanalysis.disagreement import disagreement, squared_differences
from emanalysis.score_matrix import ScoreMatrix


def matrix(scores: np.ndarray, *, sd: float = 0.0, responses: int = 4) -> ScoreMatrix:
    runs, questions = scores.shape
    return ScoreMatrix(
        scores=scores,
        response_sd=np.full(scores.shape, sd),
        responses=np.full(scores.shape, float(responses)),
        loss=np.ones(runs),
        cell=np.arange(runs),
        seed=np.zeros(runs, np.int64),
        cluster=np.arange(questions) // 2,
    )


def test_without_noise_it_is_the_root_mean_square_difference_per_question() -> None:
    """Runs 0 and 1 differ by 3 and 4 points on two questions, run 2 from run 0 by 0 and 2: worked out by hand."""
    own = matrix(np.array([[10.0, 10], [13, 14], [10, 12]]))
    squares = squared_differences(own)
    assert squares[0, 0, 1] == pytest.approx(25)
    every = disagreement(squares, own, np.ones((3, 3), bool), rng=np.random.default_rng(0))
    assert every.pairs == 3
    assert every.points == pytest.approx(np.sqrt((25 / 2 + 4 / 2 + (9 + 4) / 2) / 3))
    one = np.zeros((3, 3), bool)
    one[0, 1] = one[1, 0] = True
    found = disagreement(squares, own, one, rng=np.random.default_rng(0))
    assert (found.points, found.pairs) == (pytest.approx(np.sqrt(25 / 2)), 1)
    assert disagreement(squares, own, np.zeros((3, 3), bool), rng=np.random.default_rng(0)).pairs == 0


@pytest.mark.parametrize("apart", [0.0, 10.0])
def test_the_luck_of_samples_is_taken_off(apart: float) -> None:
    """Means of 4 responses with standard deviation 20 differ by 14 points per question by luck alone."""
    rng = np.random.default_rng(3)
    truth = np.vstack([np.full(200, 50.0), 50 + apart * rng.choice([-1, 1], 200)])
    found = []
    for _ in range(100):
        responses = truth[..., None] + rng.normal(0, 20, (2, 200, 4))
        own = matrix(responses.mean(axis=2))
        own = ScoreMatrix(**{**own.__dict__, "response_sd": responses.std(axis=2, ddof=1)})
        found.append(squared_differences(own).sum(axis=0)[0, 1] / 200)
    assert np.mean(found) == pytest.approx(apart**2, abs=8)
