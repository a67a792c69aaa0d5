"""One score of runs that may be compared: same model, data, question set and judge; runs by questions, as arrays."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MIN_TOPICS = 5
"""Topics from which on questions are clustered by topic. With fewer, questions count as independent."""


def clustered_by_topic(topics: Collection[str | None]) -> bool:
    """Whether the questions of these topics, one for each question, are clustered by them; None is no topic."""
    return None not in topics and len(set(topics)) >= MIN_TOPICS


@dataclass(frozen=True)
class ScoreMatrix:
    """Scores of R runs of C cells on Q questions of K clusters.

    A *cell* is one configuration; its runs differ in the seed alone. A *cluster* is a group of near-duplicate
    questions (one topic in several answer formats); clusters, not questions, are what is sampled independently.
    """

    scores: Floats
    """(R, Q) mean over the responses to a question, 0-100; no NaN."""
    response_sd: Floats
    """(R, Q) standard deviation of the responses to a question; NaN where there is only one."""
    responses: Floats
    """(R, Q) number of responses with a score, at least 1."""
    loss: Floats
    """(R,) held-out loss of the run."""
    cell: Ints
    """(R,) cell of the run, 0..C-1, every one of them present."""
    seed: Ints
    """(R,) seed of the run."""
    cluster: Ints
    """(Q,) cluster of the question, 0..K-1, every one of them present."""
    unsearched: NDArray[np.bool_] | None = None
    """(R,) whether no search went by the run: it confirms what a search, by other runs, had picked as a winner or as
    the baseline. None: no search picked any cell."""

    def take(self, *, runs: NDArray[np.bool_] | None = None, questions: NDArray[np.bool_] | None = None) -> Self:
        """The chosen runs and questions. Cells and clusters keep their numbers only if none disappears."""
        runs = np.ones(len(self.loss), bool) if runs is None else runs
        questions = np.ones(len(self.cluster), bool) if questions is None else questions
        chosen = np.ix_(runs, questions)
        return replace(
            self,
            scores=self.scores[chosen],
            response_sd=self.response_sd[chosen],
            responses=self.responses[chosen],
            loss=self.loss[runs],
            cell=np.unique(self.cell[runs], return_inverse=True)[1],
            seed=self.seed[runs],
            cluster=np.unique(self.cluster[questions], return_inverse=True)[1],
            unsearched=None if self.unsearched is None else self.unsearched[runs],
        )

    @property
    def cells(self) -> int:
        """Number of cells C."""
        return int(self.cell.max(initial=-1)) + 1

    @property
    def clusters(self) -> int:
        """Number of clusters K."""
        return int(self.cluster.max(initial=-1)) + 1

    @property
    def runs_per_cell(self) -> Ints:
        """(C,) number of runs, that is of seeds."""
        return np.bincount(self.cell, minlength=self.cells)

    @property
    def run_score(self) -> Floats:
        """(R,) mean over questions."""
        return self.scores.mean(axis=1)

    @property
    def response_error(self) -> Floats:
        """(R, Q) standard error of ``scores`` from sampling responses; NaN where there is only one."""
        return self.response_sd / np.sqrt(self.responses)

    def cell_mean(self, values: Floats) -> Floats:
        """Mean over the runs of each cell: (R, ...) -> (C, ...)."""
        return group_mean(values, self.cell)


def group_mean(values: Floats, group: Ints) -> Floats:
    """Mean of the rows of each group 0..G-1: (N, ...) -> (G, ...)."""
    counts = np.bincount(group)
    sums = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(sums, group, values)
    return sums / counts.reshape(-1, *[1] * (values.ndim - 1))
