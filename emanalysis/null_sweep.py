"""The largest gap that luck alone makes, from a null sweep: one cell trained with many seeds.

A sweep with one seed per cell can't tell a schedule's effect from luck, however many cells it has. The scatter between
the runs of a null sweep is luck and nothing else; here it is put on the loss-only curve of the sweep in question, and
the largest gap is taken as often as wanted.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from emanalysis.loss_curve import fit_loss_curve
from emanalysis.matched_pairs import cell_moments, question_variance
from emanalysis.max_diff import MaxDiff, max_diff
from emanalysis.score_matrix import Floats, ScoreMatrix

MIN_RUNS = 5
LUCK_SPREAD = 0.5
"""Luck differs between cells: the logarithm of its standard deviation is taken to have this one. Were it the same in
all cells, simulated sweeps with such a spread and no effect were "found" 10 % of the time at a nominal 5 %."""


@dataclass(frozen=True)
class NullReference:
    """The largest gap of a sweep beside the largest gaps of sweeps in which only loss and luck are at work."""

    observed: MaxDiff
    gaps: Floats
    """(S,) simulated largest gaps, points."""
    interval: tuple[float, float]
    """90 % interval of the pair's true difference, freed of the optimism of having been chosen as the largest."""
    error: Floats
    """(C,) standard error of each cell's mean from luck and from the choice of questions."""
    degrees_of_freedom: int
    """Runs of the null sweep less one."""

    @property
    def p(self) -> float:
        """(1 + simulated gaps at least as large) / (1 + simulations)."""
        return float((1 + np.count_nonzero(self.gaps >= self.observed.value)) / (1 + len(self.gaps)))

    def detectable(self, alpha: float, power: float) -> float:
        """Points by which a cell must beat one of equal loss to be beyond luck's gaps with probability ``power``."""
        pair = float(np.sqrt(2 * np.mean(self.error**2)))
        return float(np.quantile(self.gaps, 1 - alpha)) + float(stats.norm.ppf(power)) * pair


def null_reference(
    sweep: ScoreMatrix, null: ScoreMatrix, *, rng: np.random.Generator, simulations: int = 2000
) -> NullReference:
    """Compare the largest gap between the cell means of ``sweep`` with gaps made by loss and luck alone.

    Luck is normal with the variance of the ``null`` runs about the curve in the typical cell, and spread over cells by
    ``LUCK_SPREAD``; how uncertain k runs leave that variance is in the simulation (scaled inverse chi-square with k - 1
    degrees of freedom). Luck of the questions is judged from cells that are neighbours in loss. Raises ``ValueError``
    when ``null`` has fewer than ``MIN_RUNS`` runs or more than one cell, or ``sweep`` fewer than 2 different losses or
    clusters of questions.
    """
    if null.cells != 1 or len(null.loss) < MIN_RUNS:
        raise ValueError(
            f"a null sweep is one cell with at least {MIN_RUNS} seeds; this one has {null.cells} cells and "
            f"{len(null.loss)} runs"
        )
    if sweep.clusters < 2:
        raise ValueError("the luck of questions shows in no fewer than 2 groups of questions, and there is 1")
    moments = cell_moments(sweep)
    loss = sweep.cell_mean(sweep.loss)
    curve = fit_loss_curve(loss, moments.mean)
    spare = len(null.loss) - 1
    slope = float(curve.slope(np.array([null.loss.mean()]))[0])
    luck = float(np.var(null.run_score - slope * np.log(null.loss), ddof=1))
    single_run_noise = float(cell_moments(null).noise[0] * len(null.loss))
    questions = np.maximum(0.0, question_variance(moments, loss) - single_run_noise / moments.runs)

    expected = curve(loss)
    drawn_luck = luck * spare / rng.chisquare(spare, size=(simulations, 1))
    drawn_luck = drawn_luck * np.exp(2 * LUCK_SPREAD * rng.standard_normal((simulations, len(loss))))
    error = np.sqrt(drawn_luck / moments.runs + questions)
    simulated = expected + error * rng.standard_normal((simulations, len(loss)))
    largest = [max_diff(loss, row) for row in simulated]
    observed, gaps = max_diff(loss, moments.mean), np.array([gap.value for gap in largest])
    optimism = gaps - np.array([expected[gap.better] - expected[gap.worse] for gap in largest])
    low, high = np.quantile(optimism, [0.05, 0.95])
    return NullReference(
        observed=observed,
        gaps=gaps,
        interval=(observed.value - float(high), observed.value - float(low)),
        error=np.sqrt(luck / moments.runs + questions),
        degrees_of_freedom=spare,
    )
