"""The runs that no other run beats in both loss and alignment."""

import numpy as np
from numpy.typing import NDArray

from emanalysis.score_matrix import Floats


def pareto_front(loss: Floats, scores: Floats) -> NDArray[np.bool_]:
    """Which runs are on the front of low loss and high score, for each row of ``scores``: (N,), (B, N) -> (B, N).

    A run is on the front unless another one has no more loss and no lower score, and is better in one of the two.
    """
    order = np.argsort(loss, kind="stable")
    ranked, level = scores[:, order], loss[order]
    start = np.searchsorted(level, level, side="left")
    best = np.maximum.accumulate(ranked, axis=1)
    # Best score among strictly smaller losses, and among equal losses.
    before = np.where(start > 0, best[:, start - 1], -np.inf)
    tied = np.maximum.reduceat(ranked, np.unique(start), axis=1)[:, np.unique(start, return_inverse=True)[1]]
    front = np.empty(scores.shape, bool)
    front[:, order] = (ranked > before) & (ranked >= tied)
    return front


def membership(loss: Floats, draws: Floats) -> Floats:
    """(N,) share of the bootstrap draws (B, N) of the scores in which each run is on the front; losses as measured."""
    return pareto_front(loss, draws).mean(axis=0)
