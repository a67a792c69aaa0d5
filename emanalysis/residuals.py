"""Schedules against what loss alone predicts: a curve through some cells, tested on the others."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from emanalysis.loss_curve import LossBasis
from emanalysis.score_matrix import Floats

MIN_CURVE_CELLS = 4
MIN_TESTED_CELLS = 2


@dataclass(frozen=True)
class Residual:
    """How far cells lie above the curve on average."""

    estimate: float
    """Points."""
    error: float
    degrees_of_freedom: float
    cells: int
    """Tested cells within the curve's range of loss."""
    outside: int
    """Tested cells left out because the curve does not reach them."""

    @property
    def p(self) -> float:
        """Two-sided p-value of "on the curve"."""
        if self.error == 0:
            return float(self.estimate == 0)
        return float(2 * stats.t.sf(abs(self.estimate) / self.error, self.degrees_of_freedom))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Two-sided."""
        reach = float(stats.t.isf((1 - level) / 2, self.degrees_of_freedom)) * self.error
        return self.estimate - reach, self.estimate + reach


def residual_from_curve(
    loss: Floats, score: Floats, tested: NDArray[np.bool_], *, rng: np.random.Generator, draws: int = 200
) -> Residual:
    """Mean residual of the ``tested`` cells from the monotone curve through the others; (C,) means of cells.

    The error holds the scatter of single cells about the curve, taken to be the same for the tested ones and the
    others, and the error of the curve by the residual bootstrap. The unit is the cell, so that seeds are not counted as
    replicates of a schedule. Raises ``ValueError`` with fewer than ``MIN_CURVE_CELLS`` cells on the curve or
    ``MIN_TESTED_CELLS`` in its range.
    """
    others = ~tested
    curve_loss, curve_score = loss[others], score[others]
    if len(np.unique(curve_loss)) < MIN_CURVE_CELLS:
        raise ValueError(f"the curve needs at least {MIN_CURVE_CELLS} cells of different loss, not {others.sum()}")
    basis = LossBasis.at(curve_loss)
    curve = basis.fit(curve_score)
    inside = tested & curve.covers(loss)
    cells = int(inside.sum())
    if cells < MIN_TESTED_CELLS:
        raise ValueError(f"needs at least {MIN_TESTED_CELLS} cells in the curve's range of loss, not {cells}")
    residual = score[inside] - curve(loss[inside])

    # Residuals are drawn, not cells: a curve through cells drawn anew may not reach the tested losses.
    fitted = curve(curve_loss)
    spare = max(1, len(curve_loss) - curve.parameters)
    centred = (curve_score - fitted) * np.sqrt(len(curve_loss) / spare)
    redrawn = rng.choice(centred, size=(draws, len(centred)))
    shifts = np.array([basis.fit(fitted + noise)(loss[inside]) for noise in redrawn])

    from_curve = float(np.var(shifts.mean(axis=1), ddof=1))
    own = float(((residual - residual.mean()) ** 2).sum())
    degrees = spare + cells - 1
    scatter = (float(((curve_score - fitted) ** 2).sum()) + own) / degrees
    variance = scatter / cells + from_curve
    return Residual(
        estimate=float(residual.mean()),
        error=float(np.sqrt(variance)),
        degrees_of_freedom=float(degrees),
        cells=cells,
        outside=int(tested.sum()) - cells,
    )
