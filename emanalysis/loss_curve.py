"""Alignment as a function of loss alone: a smooth curve that never falls as the loss grows.

"Less loss costs alignment, or nothing" is what a better minimum has to beat; a trend the other way is left in the
residuals.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from scipy.optimize import nnls

from emanalysis.score_matrix import Floats

DEGREE = 2
MAX_SPANS = 3
CELLS_PER_SPAN = 4


@dataclass(frozen=True)
class LossCurve:
    """A monotone regression spline (Ramsay, Statistical Science 3, 1988) in log loss, constant outside its range."""

    spline: BSpline

    def __call__(self, loss: Floats) -> Floats:
        """The score that ``loss`` alone predicts, in the units of the scores; any shape."""
        return np.asarray(self.spline(np.clip(np.log(loss), self.spline.t[0], self.spline.t[-1])))

    def slope(self, loss: Floats) -> Floats:
        """Points per unit of log loss at ``loss``; 0 outside the fitted range."""
        return np.where(self.covers(loss), self.spline.derivative()(np.log(loss)), 0.0)

    def covers(self, loss: Floats) -> NDArray[np.bool_]:
        """Whether ``loss`` lies in the range the curve was fitted on."""
        return np.asarray((np.log(loss) >= self.spline.t[0]) & (np.log(loss) <= self.spline.t[-1]))

    @property
    def parameters(self) -> int:
        """Parameters that the fit used: the level, and each step that is not 0."""
        return 1 + int(np.count_nonzero(np.diff(self.spline.c) > 0))


@dataclass(frozen=True)
class LossBasis:
    """The curves that can be fitted at given losses; one of these fits many score vectors."""

    knots: Floats
    degree: int
    columns: Floats
    """(N, P) values at the losses of the functions that a curve is a non-negative sum of."""

    @classmethod
    def at(cls, loss: Floats) -> "LossBasis":
        """Straight lines through fewer than 4 distinct losses, then quadratics with a knot for every 4 further ones, at
        most two. Raises ``ValueError`` with fewer than 2 distinct losses.
        """
        x = np.log(loss)
        levels = np.unique(x)
        if len(levels) < 2:
            raise ValueError(f"a curve over loss needs at least 2 different losses, not {len(levels)}")
        degree = 1 if len(levels) < 4 else DEGREE
        spans = 1 if degree == 1 else int(np.clip(len(levels) // CELLS_PER_SPAN, 1, MAX_SPANS))
        inner = np.quantile(levels, np.linspace(0, 1, spans + 1)[1:-1])
        knots = np.concatenate([[levels[0]] * (degree + 1), inner, [levels[-1]] * (degree + 1)])
        basis = BSpline.design_matrix(x, knots, degree).toarray()
        # A spline whose coefficients do not fall does not fall: each is the sum of the steps before it, none negative.
        steps = np.cumsum(basis[:, ::-1], axis=1)[:, ::-1][:, 1:]
        ones = np.ones((len(x), 1))
        return cls(knots, degree, np.hstack([ones, -ones, steps]))

    def fit(self, score: Floats) -> LossCurve:
        """Least squares; (N,) scores."""
        weights, _ = nnls(self.columns, score)
        coefficients = (weights[0] - weights[1]) + np.concatenate([[0.0], np.cumsum(weights[2:])])
        return LossCurve(BSpline(self.knots, coefficients, self.degree))

    def fitted(self, score: Floats) -> Floats:
        """(N,) values of the fit at its own losses."""
        return np.asarray(self.columns @ nnls(self.columns, score)[0])


def fit_loss_curve(loss: Floats, score: Floats) -> LossCurve:
    """The curve through (N,) losses and scores; fitting it to cell means gives every cell the same weight."""
    return LossBasis.at(loss).fit(score)
