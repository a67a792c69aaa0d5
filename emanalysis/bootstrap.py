"""The hierarchical bootstrap: seeds outermost, questions within, responses innermost."""

import numpy as np

from emanalysis.score_matrix import Floats, ScoreMatrix


def run_draws(matrix: ScoreMatrix, *, rng: np.random.Generator, draws: int) -> Floats:
    """(draws, R) mean scores of the runs with clusters of questions and responses drawn anew.

    Every run gets the same clusters in a draw, so differences between runs stay paired by question. A mean over newly
    drawn responses is normal around the observed one with its standard error; unknown errors count as 0.
    """
    clusters = matrix.clusters
    indicator = np.eye(clusters)[matrix.cluster]
    totals = matrix.scores @ indicator
    errors = np.nan_to_num(matrix.response_error) ** 2 @ indicator
    chosen = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws).astype(float)
    questions = (chosen @ np.bincount(matrix.cluster, minlength=clusters))[:, None]
    noise = np.sqrt(chosen**2 @ errors.T) / questions
    return chosen @ totals.T / questions + noise * rng.standard_normal(noise.shape)


def cell_draws(matrix: ScoreMatrix, *, rng: np.random.Generator, draws: int) -> Floats:
    """(draws, C) mean scores of the cells with seeds, clusters of questions and responses drawn anew.

    Drawing n seeds from n understates their variance by (n - 1) / n, which is half of it with two seeds; runs are
    moved away from their cell's mean by sqrt(n / (n - 1)) to make up for it. A cell with one run keeps that run: the
    luck of its seed is not in the draws.
    """
    runs = run_draws(matrix, rng=rng, draws=draws)
    cells = np.empty((draws, matrix.cells))
    for number, count in enumerate(matrix.runs_per_cell):
        own = runs[:, matrix.cell == number]
        mean = own.mean(axis=1)
        if count > 1:
            chosen = rng.multinomial(count, np.full(count, 1 / count), size=draws) / count
            mean = mean + (chosen * (own - mean[:, None])).sum(axis=1) * np.sqrt(count / (count - 1))
        cells[:, number] = mean
    return cells


def percentile_interval(draws: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Lower and upper end over the first axis."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
