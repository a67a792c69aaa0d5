"""The maximum over all pairs, tested as a maximum: by permuting labels within bins of loss.

If a label (the cell, the schedule) did nothing beyond what the loss explains, the residuals from the loss-only curve
would be exchangeable among units of similar loss. The statistic is the largest difference between any two labels, so
the number of pairs is accounted for. Residuals, not scores, are moved, since scores still depend on loss within a bin,
and the curve is fitted anew each time, since it follows the labels a little (Freedman & Lane, J. Business & Economic
Statistics 1, 1983).
"""

from dataclasses import dataclass

import numpy as np

from emanalysis.loss_curve import LossBasis
from emanalysis.score_matrix import Floats, Ints


@dataclass(frozen=True)
class MaxTest:
    """A permutation test of the largest difference between labels."""

    difference: float
    """Largest minus smallest mean residual of a label, points."""
    p: float
    """(1 + permutations at least as large) / (1 + permutations), each mean times the root of its number of units."""
    null_mean: float
    """Of ``difference`` over the permutations."""
    null_95: float
    units: int
    bins: int


def loss_bins(loss: Floats, size: int) -> Ints:
    """(N,) number of the bin of each unit: equal counts by rank of loss, at least ``size`` units each."""
    bins = max(1, len(loss) // size)
    rank = np.argsort(np.argsort(loss, kind="stable"), kind="stable")
    return (rank * bins) // len(loss)


def max_test(
    loss: Floats, score: Floats, label: Ints, bins: Ints, *, rng: np.random.Generator, permutations: int = 1000
) -> MaxTest:
    """Do labels differ by more than the units within a bin do?

    ``loss``, ``score``, ``label`` (0..L-1) and ``bins`` are (N,) by unit. What must stay together is one unit: to ask
    whether *cells* differ beyond the luck of seeds the units are runs; to ask whether *schedules* differ beyond the
    scatter of cells they are cells, each with all of its seeds. Raises ``ValueError`` when no bin holds two labels,
    since then every permutation is the data.
    """
    if all(len(np.unique(label[bins == number])) < 2 for number in np.unique(bins)):
        raise ValueError("no loss bin holds two labels, so there is nothing to permute")
    basis = LossBasis.at(loss)
    fitted = basis.fitted(score)
    residual = score - fitted
    units = np.bincount(label)
    indicator = np.eye(len(units))[label] / units

    def spread(scores: Floats) -> tuple[float, float]:
        """In points; and for the test, with means of unequal accuracy and residuals of unequal scatter on one scale."""
        left = scores - basis.fitted(scores)
        means, scatter = left @ indicator, np.sqrt(np.mean(left**2))
        # Without any scatter (to rounding) no label differs from another.
        relative = np.ptp(means * np.sqrt(units)) / scatter if scatter > 1e-9 else 0.0
        return float(np.ptp(means)), float(relative)

    by_bin = np.argsort(bins, kind="stable")
    shuffled = np.argsort(bins[by_bin] + rng.random((permutations, len(loss))), axis=1)
    moved = np.empty((permutations, len(loss)))
    moved[:, by_bin] = residual[by_bin][shuffled]
    points, observed = spread(score)
    null = np.array([spread(fitted + row) for row in moved])
    # A tolerance, since sums in another order differ in the last digits.
    p = (1 + np.count_nonzero(null[:, 1] >= observed * (1 - 1e-9))) / (1 + permutations)
    return MaxTest(
        difference=points,
        p=float(p),
        null_mean=float(null[:, 0].mean()),
        null_95=float(np.quantile(null[:, 0], 0.95)),
        units=len(loss),
        bins=len(np.unique(bins)),
    )
