"""How differently two runs answer the same questions, beyond the luck of their samples."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emanalysis.bootstrap import percentile_interval
from emanalysis.score_matrix import Floats, ScoreMatrix


@dataclass(frozen=True)
class Disagreement:
    """Root mean square difference in score per question, in points, over pairs of runs, with a 95 % interval."""

    points: float
    low: float
    high: float
    pairs: int


def squared_differences(matrix: ScoreMatrix) -> Floats:
    """(K, R, R) sum over each cluster's questions of the squared difference between two runs' mean scores.

    The variance that the means have from their samples is taken off, so that two runs that differ by luck alone have 0
    on average, and may have less; where a question was sampled once it is not known, and nothing is taken off.
    """
    variance = np.nan_to_num(matrix.response_error) ** 2
    sums = np.empty((matrix.clusters, len(matrix.loss), len(matrix.loss)))
    for cluster in range(matrix.clusters):
        own = matrix.cluster == cluster
        scores, noise = matrix.scores[:, own], variance[:, own].sum(axis=1)
        squares = (scores**2).sum(axis=1) - noise
        sums[cluster] = squares[:, None] + squares - 2 * scores @ scores.T
    return sums


def disagreement(
    squares: Floats, matrix: ScoreMatrix, chosen: NDArray[np.bool_], *, rng: np.random.Generator, draws: int = 1000
) -> Disagreement:
    """Over the ``chosen`` (R, R) pairs of runs, i before j, from ``squared_differences`` of the ``matrix``.

    The interval draws clusters of questions anew; the runs stay as they are. NaN without a pair.
    """
    upper = np.triu(chosen, k=1)
    pairs = int(upper.sum())
    if not pairs:
        return Disagreement(np.nan, np.nan, np.nan, 0)
    totals, sizes = squares[:, upper].sum(axis=1), np.bincount(matrix.cluster)
    clusters = len(sizes)
    weights = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws)
    low, high = percentile_interval(weights @ totals / (weights @ sizes) / pairs)
    mean = totals.sum() / sizes.sum() / pairs
    value, low, high = np.sqrt(np.maximum([mean, low, high], 0))
    return Disagreement(float(value), float(low), float(high), pairs)
