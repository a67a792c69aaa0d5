import numpy as np
import pytest

from emanalysis.score_matrix import ScoreMatrix, group_mean


@pytest.fixture
def matrix() -> ScoreMatrix:
    return ScoreMatrix(
        scores=np.arange(12.0).reshape(4, 3),
        response_sd=np.full((4, 3), 6.0),
        responses=np.full((4, 3), 9.0),
        loss=np.array([1.0, 2.0, 3.0, 5.0]),
        cell=np.array([0, 1, 2, 2]),
        seed=np.array([0, 0, 0, 1]),
        cluster=np.array([0, 1, 1]),
    )


def test_counts_and_means(matrix: ScoreMatrix) -> None:
    assert (matrix.cells, matrix.clusters) == (3, 2)
    assert matrix.runs_per_cell.tolist() == [1, 1, 2]
    assert matrix.run_score.tolist() == [1.0, 4.0, 7.0, 10.0]
    assert matrix.cell_mean(matrix.loss).tolist() == [1.0, 2.0, 4.0]
    assert matrix.response_error.tolist() == np.full((4, 3), 2.0).tolist()


def test_taking_a_part_numbers_what_is_left_anew(matrix: ScoreMatrix) -> None:
    part = matrix.take(runs=matrix.cell != 1, questions=matrix.cluster == 1)
    assert part.cell.tolist() == [0, 1, 1]
    assert part.cluster.tolist() == [0, 0]
    assert part.scores.tolist() == [[1.0, 2.0], [7.0, 8.0], [10.0, 11.0]]
    assert part.loss.tolist() == [1.0, 3.0, 5.0]


def test_group_mean_keeps_further_axes() -> None:
    means = group_mean(np.array([[1.0, 2.0], [3.0, 4.0], [7.0, 0.0]]), np.array([1, 1, 0]))
    assert means.tolist() == [[7.0, 0.0], [2.0, 3.0]]
