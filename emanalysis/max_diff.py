"""The largest gap in alignment between two runs of which the better one has no more loss (arXiv 2606.20814)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class MaxDiff(NamedTuple):
    """The pair that attains it: ``loss[better] <= loss[worse]`` and ``value = score[better] - score[worse]``."""

    value: float
    """Points of the score; negative when every run with less loss has a lower score."""
    better: int
    worse: int


def max_diff(loss: ArrayLike, score: ArrayLike) -> MaxDiff:
    """The maximum of ``score[i] - score[j]`` over ordered pairs of different runs with ``loss[i] <= loss[j]``.

    ``loss`` and ``score`` are (N,) without NaN, N >= 2. It is a maximum over N (N - 1) / 2 noisy differences: positive
    for any data with noise, and growing with N.
    """
    loss, score = np.asarray(loss, float), np.asarray(score, float)
    if loss.shape != score.shape or loss.ndim != 1 or len(loss) < 2:
        raise ValueError(f"max_diff needs the losses and scores of at least 2 runs, not {loss.shape} and {score.shape}")
    # By loss; among equal losses the best score first, since both orders of such a pair are allowed.
    order = np.lexsort((-score, loss))
    ranked = score[order]
    lowest_from_here = np.minimum.accumulate(ranked[::-1])[::-1]
    gaps = ranked[:-1] - lowest_from_here[1:]
    first = int(gaps.argmax())
    second = first + 1 + int(ranked[first + 1 :].argmin())
    return MaxDiff(float(gaps[first]), int(order[first]), int(order[second]))
