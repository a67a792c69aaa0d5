"""Do the weight updates of runs fall into groups? Hierarchical clustering by direction."""

from dataclasses import dataclass

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from sklearn.metrics import adjusted_rand_score, silhouette_score

from emanalysis.score_matrix import Floats, Ints

MIN_RUNS = 4
MOST_CLUSTERS = 10
SUBSTANTIAL = 0.25
"""Mean silhouette below which groups are no structure (Kaufman & Rousseeuw 1990)."""


@dataclass(frozen=True)
class Clustering:
    """Groups of N runs."""

    label: Ints
    """(N,) group of each run from 0; all 0 where there is no structure."""
    silhouette: float
    """Of the best number of groups, whether substantial or not; NaN where the updates do not differ."""
    order: Ints
    """(N,) the runs as leaves of the tree, like beside like."""

    @property
    def groups(self) -> int:
        """How many."""
        return int(self.label.max()) + 1

    def agreement(self, other: Ints) -> float:
        """Adjusted Rand index with another grouping of the runs: 0 is chance, 1 the same; NaN with one group."""
        if self.groups < 2 or len(np.unique(other)) < 2:
            return np.nan
        return float(adjusted_rand_score(other, self.label))


def cluster(cosines: Floats) -> Clustering | None:
    """Average linkage of (N, N) cosines on 1 - cosine; as many groups as have the largest mean silhouette.

    None with fewer than ``MIN_RUNS`` runs.
    """
    runs = len(cosines)
    if runs < MIN_RUNS:
        return None
    distances = np.clip(1 - (cosines + cosines.T) / 2, 0, 2)
    np.fill_diagonal(distances, 0)
    tree = hierarchy.linkage(squareform(distances, checks=False), method="average")
    best, label = np.nan, np.zeros(runs, np.int64)
    for groups in range(2, min(MOST_CLUSTERS, runs - 1) + 1):
        found = hierarchy.fcluster(tree, groups, criterion="maxclust")
        if len(np.unique(found)) == groups:
            silhouette = float(silhouette_score(distances, found, metric="precomputed"))
            if not silhouette <= best:
                best, label = silhouette, found.astype(np.int64) - 1
    if not best >= SUBSTANTIAL:
        label = np.zeros(runs, np.int64)
    return Clustering(label, best, hierarchy.leaves_list(tree).astype(np.int64))
