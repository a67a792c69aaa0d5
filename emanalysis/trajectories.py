"""Checkpoints of different runs at the same loss: what alignment each had left when it got there."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from emanalysis.score_matrix import Floats, Ints, group_mean


@dataclass(frozen=True)
class LevelTest:
    """Do cells differ in score at one loss level?"""

    loss: float
    mean: Floats
    """(C,) mean over the runs of each cell."""
    error: Floats
    """(C,) standard error over the runs; NaN with one run."""
    p: float
    """Alexander & Govern (1994), which lets cells differ in variance; NaN where a cell has fewer than two runs."""


def score_at_losses(loss: Floats, score: Floats, levels: Floats) -> Floats:
    """(L,) score of one run when its loss first came down to each of the ``levels``; NaN for levels it did not cross.

    ``loss`` and ``score`` are (T,) by checkpoint in order of time. Checkpoints whose loss is no new minimum are passed
    over; between the others the score is linear in log loss.
    """
    before = np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    new = loss < before
    x, y = np.log(loss[new])[::-1], score[new][::-1]
    return np.asarray(np.interp(np.log(levels), x, y, left=np.nan, right=np.nan))


def common_levels(paths: list[Floats], count: int = 5) -> Floats:
    """(count,) loss levels, equally spaced in log loss, that every run's checkpoints cross.

    ``paths`` holds the losses of each run by checkpoint. Raises ``ValueError`` when there is no such range.
    """
    low, high = max(path.min() for path in paths), min(path[0] for path in paths)
    if not low < high:
        raise ValueError(f"no loss is crossed by every run: one never got below {low:.4f}, one began at {high:.4f}")
    # Clipped, since the exponential of a logarithm may lie just outside.
    return np.clip(np.exp(np.linspace(np.log(low), np.log(high), count)), low, high)


def compare_at_levels(scores: Floats, cell: Ints, levels: Floats) -> list[LevelTest]:
    """Test each level: (R, L) scores without NaN, (R,) cells 0..C-1, (L,) levels."""
    runs = np.bincount(cell)
    tests = []
    for level, column in zip(levels, scores.T, strict=True):
        mean = group_mean(column, cell)
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.sqrt(np.bincount(cell, (column - mean[cell]) ** 2) / (runs - 1) / runs)
        groups = [column[cell == number] for number in range(len(runs))]
        testable = len(runs) > 1 and runs.min() > 1 and min(np.ptp(group) for group in groups) > 0
        p = float(stats.alexandergovern(*groups).pvalue) if testable else np.nan
        tests.append(LevelTest(float(level), mean, np.where(runs > 1, error, np.nan), p))
    return tests
