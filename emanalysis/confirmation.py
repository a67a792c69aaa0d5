"""A pair is chosen on some seeds and questions and put to the test on the others.

The best of many pairs looks better than it is. Held-back seeds know nothing of the luck of the seeds it was chosen by,
held-back questions nothing of that of the questions; so the test needs no correction for the number of pairs, and no
assumption on how luck differs from cell to cell.

Of cells that a search had picked, the seeds that it went by had their part in the choice, all of them: only the seeds
of its confirmation are held back.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from emanalysis.loss_curve import LossCurve, fit_loss_curve
from emanalysis.matched_pairs import Difference, cell_moments, differences
from emanalysis.max_diff import max_diff
from emanalysis.score_matrix import Floats, ScoreMatrix

MIN_SEEDS = MIN_CLUSTERS = 3
"""One to choose by, and two to confirm by and see how much they differ."""
MIN_HELD_BACK = 2
"""Seeds to confirm by."""


def choosing_seeds(seeds: int) -> int:
    """How many of a cell's seeds the pair is chosen by: a third. Confirming needs them more: of 3 seeds, 2 are left."""
    return max(1, seeds // 3)


def choosing_clusters(clusters: int) -> int:
    """How many clusters of questions the pair is chosen by: half."""
    return max(1, clusters // 2)


def held_back(matrix: ScoreMatrix) -> NDArray[np.bool_]:
    """(R,) whether a run has no part in choosing the pair.

    Where a search picked the cells, the runs that it went by choose. Where it did not, and in a cell that has no such
    runs, the lowest seeds do, which are the same ones in cells of the same seeds, since runs of one seed may share
    their data order.
    """
    back = np.ones(len(matrix.seed), bool) if matrix.unsearched is None else matrix.unsearched.copy()
    for cell in range(matrix.cells):
        own = np.flatnonzero(matrix.cell == cell)
        if back[own].all():
            back[own[np.argsort(matrix.seed[own], kind="stable")][: choosing_seeds(len(own))]] = False
    return back


def confirmable(matrix: ScoreMatrix) -> NDArray[np.bool_]:
    """(C,) whether a cell has runs to be chosen by and ``MIN_HELD_BACK`` to be confirmed by."""
    return np.bincount(matrix.cell[held_back(matrix)], minlength=matrix.cells) >= MIN_HELD_BACK


def needed_seeds(matrix: ScoreMatrix) -> str:
    """What it takes to be ``confirmable``, in words."""
    if matrix.unsearched is None or matrix.unsearched.all():
        return f"at least {MIN_SEEDS} seeds of a configuration"
    return f"at least {MIN_HELD_BACK} seeds of a configuration that the search has not seen"


def split(matrix: ScoreMatrix, *, rng: np.random.Generator) -> tuple[ScoreMatrix, ScoreMatrix]:
    """The part to choose on and the part to confirm on; they share neither a run nor a cluster of questions.

    Runs are parted by ``held_back``, clusters are drawn. Raises ``ValueError`` with cells that are not ``confirmable``
    or fewer than ``MIN_CLUSTERS`` clusters.
    """
    if not confirmable(matrix).all():
        raise ValueError(f"it takes {needed_seeds(matrix)}, and one has fewer")
    if matrix.clusters < MIN_CLUSTERS:
        raise ValueError(f"it takes at least {MIN_CLUSTERS} groups of questions, and there are {matrix.clusters}")
    choosing = ~held_back(matrix)
    first = rng.permutation(matrix.clusters)[: choosing_clusters(matrix.clusters)]
    questions = np.isin(matrix.cluster, first)
    return matrix.take(runs=choosing, questions=questions), matrix.take(runs=~choosing, questions=~questions)


@dataclass(frozen=True)
class Choice:
    """The pair with the largest gap where pairs were chosen, and the loss-only curve there."""

    better: int
    worse: int
    gap: float
    """Points; too large by having been chosen."""
    curve: LossCurve


@dataclass(frozen=True)
class Confirmation:
    """The chosen pair on seeds and questions that had no part in choosing it. Differences are better - worse."""

    score: Difference
    beyond_loss: Difference
    """Of the scores less what the curve predicts from each run's loss: what a difference in loss does not explain,
    with the luck of the losses in its error."""
    loss: float
    loss_interval: tuple[float, float]
    """90 %, Welch."""

    @property
    def p(self) -> float:
        """P-value of "no better, or only by what its loss explains": the larger one of the two tests."""
        return float(max(self.score.p_greater, self.beyond_loss.p_greater))

    @property
    def no_more_loss(self) -> bool:
        """Whether the held-back runs are compatible with the better cell having no more loss."""
        return self.loss_interval[0] <= 0


def choose(matrix: ScoreMatrix) -> Choice:
    """The pair of cells with the largest gap. Raises ``ValueError`` with fewer than 2 different losses."""
    loss, score = matrix.cell_mean(matrix.loss), matrix.cell_mean(matrix.run_score)
    gap = max_diff(loss, score)
    return Choice(gap.better, gap.worse, gap.value, fit_loss_curve(loss, score))


def confirm(matrix: ScoreMatrix, choice: Choice) -> Confirmation:
    """Test the chosen pair on ``matrix``, which has the same cells and at least two runs in each."""
    net = replace(matrix, scores=matrix.scores - choice.curve(matrix.loss)[:, None])
    better, worse = (matrix.loss[matrix.cell == cell] for cell in (choice.better, choice.worse))
    return Confirmation(
        score=differences(cell_moments(matrix), choice.better, choice.worse),
        beyond_loss=differences(cell_moments(net), choice.better, choice.worse),
        loss=float(better.mean() - worse.mean()),
        loss_interval=_welch_interval(better, worse),
    )


def _welch_interval(a: Floats, b: Floats, level: float = 0.9) -> tuple[float, float]:
    if np.ptp(a) == np.ptp(b) == 0:
        return float(a.mean() - b.mean()), float(a.mean() - b.mean())
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(level)
    return float(interval.low), float(interval.high)
