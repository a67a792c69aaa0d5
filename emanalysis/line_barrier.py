"""Barriers on the straight line between two runs: how much worse it gets on the way than the ends are."""

from dataclasses import dataclass

import numpy as np

from emanalysis.bootstrap import percentile_interval, run_draws
from emanalysis.score_matrix import Floats, ScoreMatrix

DRAWS = 1000


@dataclass(frozen=True)
class Barrier:
    """The excess of a curve over the straight line between its ends, with 95 % bootstrap intervals.

    ``height`` is the largest excess, 0 where none is above, as in Entezari et al. 2022 (arXiv 2110.06296); Frankle et
    al. 2020 (arXiv 1912.05671) subtract the mean of the ends instead, which is the same for ends of equal value. As a
    maximum it leans upwards where the curve is noisy; ``middle``, the excess halfway, does not.
    """

    height: float
    low: float
    high: float
    at: float
    """Where on the line, 0 to 1; NaN where nothing is above."""
    middle: float
    """NaN where nothing was measured halfway."""
    middle_low: float
    middle_high: float


def excess(t: Floats, values: Floats) -> Floats:
    """(..., T) ``values`` minus the straight line between the first (t = 0) and the last (t = 1)."""
    return values - ((1 - t) * values[..., :1] + t * values[..., -1:])


def barrier(t: Floats, values: Floats, draws: Floats) -> Barrier:
    """The barrier of a curve (T,) at ``t``, ascending from 0 to 1; ``draws`` (D, T) are the curve drawn anew.

    Raises ``ValueError`` when an end of the line is missing.
    """
    if t[0] != 0 or t[-1] != 1:
        raise ValueError(f"a barrier needs both ends of the line; there are points from {t[0]:g} to {t[-1]:g}")
    above, drawn = excess(t, values), excess(t, draws)
    low, high = percentile_interval(drawn.max(axis=1))
    top = int(above.argmax())
    half = np.flatnonzero(np.isclose(t, 0.5))
    middle = middle_low = middle_high = np.nan
    if len(half):
        middle = float(above[half[0]])
        middle_low, middle_high = (float(end) for end in percentile_interval(drawn[:, half[0]]))
    at = float(t[top]) if above[top] > 0 else np.nan
    return Barrier(max(0.0, float(above[top])), float(low), float(high), at, middle, middle_low, middle_high)


def loss_barrier(t: Floats, losses: Floats, tokens: Floats, *, rng: np.random.Generator) -> Barrier:
    """Of the loss per token: ``losses`` (T, R) summed over each held-out row, ``tokens`` (R,) of the rows.

    Rows are drawn anew, the same ones at all points.
    """
    rows = len(tokens)
    weights = rng.multinomial(rows, np.full(rows, 1 / rows), size=DRAWS).astype(float)
    return barrier(t, losses.sum(axis=1) / tokens.sum(), weights @ losses.T / (weights @ tokens)[:, None])


def alignment_barrier(t: Floats, points: ScoreMatrix, *, rng: np.random.Generator) -> Barrier:
    """Of alignment, where a barrier is a fall: the "runs" of the matrix are the points at ``t``.

    Topics of questions and responses are drawn anew, the same topics at all points.
    """
    return barrier(t, -points.run_score, -run_draws(points, rng=rng, draws=DRAWS))
