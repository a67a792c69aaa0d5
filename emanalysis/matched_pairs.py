"""Differences between two cells on the same questions, with the luck of seeds and of questions in their error.

The score of a run on a question is taken as cell + question + (cell x question) + (seed within cell) + (seed x
question, response sampling included): seeds are nested in cells, questions are crossed with everything. The variance
of the difference of two cell means then is

    seeds_A + seeds_B + interaction

where ``seeds`` is the variance of a cell's run means over its number of runs, and ``interaction`` is what the paired
differences of the questions vary by beyond the noise of single seeds. The components are mean squares, so the degrees
of freedom are Satterthwaite's (Biometrics Bulletin 2, 1946). Questions enter as clusters of near-duplicates.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from emanalysis.score_matrix import Floats, Ints, ScoreMatrix


@dataclass(frozen=True)
class CellMoments:
    """What differences between C cells are made of."""

    mean: Floats
    """(C,) mean over runs and questions."""
    runs: Ints
    """(C,)"""
    seeds: Floats
    """(C,) variance of ``mean`` from seeds; NaN for a cell with one run."""
    noise: Floats
    """(C,) part of ``question_deviations``' squared length that is seed x question noise; 0 for a cell with one run."""
    question_deviations: Floats
    """(C, K) deviation of each cluster from the cell's mean, scaled so that the squared length of the difference of
    two rows is the variance of the difference of two means from questions."""


@dataclass(frozen=True)
class Difference:
    """Estimates of mean(A) - mean(B), one for each pair; every field has the same shape."""

    estimate: Floats
    error: Floats
    """Standard error. Where a cell has one run, the luck of its seed is not in it."""
    degrees_of_freedom: Floats

    @property
    def p_greater(self) -> Floats:
        """One-sided p-value of "A is no better than B"."""
        return np.asarray(stats.t.sf(self._statistic(0.0), self.degrees_of_freedom))

    def p_less(self, margin: float) -> Floats:
        """One-sided p-value of "A is better than B by ``margin`` or more"."""
        return np.asarray(stats.t.cdf(self._statistic(margin), self.degrees_of_freedom))

    def p_equivalent(self, margin: float) -> Floats:
        """TOST (Schuirmann 1987): p-value of "A and B differ by ``margin`` or more, in either direction"."""
        return np.maximum(self.p_less(margin), stats.t.sf(self._statistic(-margin), self.degrees_of_freedom))

    def bounds(self, level: float = 0.9) -> tuple[Floats, Floats]:
        """Lower and upper end of the two-sided interval that covers with probability ``level``."""
        reach = stats.t.isf((1 - level) / 2, self.degrees_of_freedom) * self.error
        return self.estimate - reach, self.estimate + reach

    def _statistic(self, shift: float) -> Floats:
        # Equal cells without any spread: no evidence for either, not a division by zero.
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num((self.estimate - shift) / self.error, nan=0.0, posinf=np.inf, neginf=-np.inf)


def cell_moments(matrix: ScoreMatrix) -> CellMoments:
    """Means and variance components of the cells of ``matrix``."""
    cell, runs, clusters = matrix.cell, matrix.runs_per_cell, matrix.clusters
    weight = np.bincount(matrix.cluster) / len(matrix.cluster)
    indicator = np.eye(clusters)[matrix.cluster] / np.bincount(matrix.cluster)
    by_cluster = matrix.scores @ indicator
    run_mean = by_cluster @ weight
    cell_by_cluster = matrix.cell_mean(by_cluster)
    mean = cell_by_cluster @ weight
    unbias = np.sqrt(clusters / (clusters - 1)) if clusters > 1 else np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        per_run = 1 / ((runs - 1) * runs)
        seeds = np.bincount(cell, (run_mean - mean[cell]) ** 2) * per_run
        residual = weight * ((by_cluster - run_mean[:, None]) - (cell_by_cluster - mean[:, None])[cell]) * unbias
        noise = np.bincount(cell, (residual**2).sum(axis=1)) * per_run
    alone = runs == 1
    return CellMoments(
        mean=mean,
        runs=runs,
        seeds=np.where(alone, np.nan, seeds),
        noise=np.where(alone, 0.0, noise),
        question_deviations=weight * (cell_by_cluster - mean[:, None]) * unbias,
    )


def differences(moments: CellMoments, a: ArrayLike, b: ArrayLike) -> Difference:
    """Mean of cell ``a`` minus mean of cell ``b``, for arrays of cell numbers of equal shape.

    With one run in every cell and every question its own cluster this is the paired t-test over questions.
    """
    a, b = np.asarray(a, np.int64), np.asarray(b, np.int64)
    clusters = moments.question_deviations.shape[1]
    questions = _squared_distance(moments.question_deviations, a, b)
    noise_a, noise_b = moments.noise[a], moments.noise[b]
    interaction = np.maximum(0.0, questions - noise_a - noise_b)
    seeds = np.nan_to_num(moments.seeds)
    variance = seeds[a] + seeds[b] + interaction
    spare = np.maximum(moments.runs - 1, 1)
    squares = seeds[a] ** 2 / spare[a] + seeds[b] ** 2 / spare[b]
    squares += np.where(
        interaction > 0,
        (questions**2 + noise_a**2 / spare[a] + noise_b**2 / spare[b]) / max(clusters - 1, 1),
        0.0,
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = variance**2 / squares
    return Difference(
        estimate=moments.mean[a] - moments.mean[b],
        error=np.sqrt(variance),
        degrees_of_freedom=np.where(np.isfinite(degrees), degrees, max(clusters - 1, 1)),
    )


def question_variance(moments: CellMoments, loss: Floats) -> float:
    """Variance of one cell's mean from questions and seed x question noise, from pairs of neighbours in loss.

    Questions fall at different rates as the loss does; between neighbours that is small (cf. Rice, Annals of Statistics
    12, 1984). NaN with one cluster.
    """
    ranked = moments.question_deviations[np.argsort(loss, kind="stable")]
    return float((np.diff(ranked, axis=0) ** 2).sum(axis=1).mean() / 2)


def ordered_pairs(loss: Floats, slack: float | Floats = 0.0) -> tuple[Ints, Ints]:
    """Every ordered pair (A, B) of different cells with ``loss[A] <= loss[B] + slack``: two arrays of cell numbers.

    ``slack`` is one number or a (C, C) array.
    """
    allowed: NDArray[np.bool_] = loss[:, None] <= loss[None, :] + slack
    np.fill_diagonal(allowed, False)
    a, b = np.nonzero(allowed)
    return a, b


def _squared_distance(rows: Floats, a: Ints, b: Ints) -> Floats:
    # In slices: 400 cells make 160,000 pairs, which with 300 questions each would be 380 MB at once.
    flat_a, flat_b = a.ravel(), b.ravel()
    total = np.empty(len(flat_a))
    for start in range(0, len(flat_a), 10_000):
        part = slice(start, start + 10_000)
        total[part] = ((rows[flat_a[part]] - rows[flat_b[part]]) ** 2).sum(axis=1)
    return total.reshape(a.shape)
