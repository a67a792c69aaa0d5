"""How large a difference a sweep can confirm, and how much more data a smaller one needs."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy import optimize, stats
from scipy.integrate import trapezoid

from emanalysis.confirmation import (
    MIN_CLUSTERS,
    MIN_HELD_BACK,
    MIN_SEEDS,
    choosing_clusters,
    choosing_seeds,
    held_back,
)
from emanalysis.matched_pairs import cell_moments, question_variance
from emanalysis.score_matrix import ScoreMatrix, clustered_by_topic

ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 64
MOST_QUESTIONS = 64
MOST_SAMPLES = 64


@dataclass(frozen=True)
class Noise:
    """Standard deviations, in points, of what a score of one run on one cluster of questions is made of."""

    seed: float
    """Of a run's mean over all conceivable questions, among the seeds of a cell."""
    interaction: float
    """Of a cell's deviation on a cluster from what its mean and the cluster's let expect."""
    seed_question: float
    """Of a run's own deviation on a cluster, beyond the sampling of responses."""
    response: float
    """Of a single response about its run's mean on the question."""


FIELD = Noise(seed=6.0, interaction=7.2, seed_question=0.0, response=24.2)
"""From the 35 published runs of arXiv 2606.20814 (24 questions, 50 samples), each question its own cluster.

No cell there has two seeds. ``seed`` is the scatter of the runs about their log-loss line, so it holds whatever the
schedules did and is an upper bound; ``interaction`` holds the seed x question noise. To be replaced by
``estimate_noise`` of an own sweep.
"""


@dataclass(frozen=True)
class Design:
    """The size of a sweep."""

    cells: int
    """Cells that compete for being the best one."""
    seeds: int
    """Per cell."""
    clusters: int
    """Clusters of near-duplicate questions."""
    questions_per_cluster: float = 1.0
    samples: float = 10.0
    """Responses per question."""
    search_seeds: int | None = None
    """Those of ``seeds`` that a search has seen, which only choose; None: there was no search, and a third choose."""

    @property
    def choosing_seeds(self) -> int:
        """How many of a cell's seeds the pair is chosen by."""
        return choosing_seeds(self.seeds) if self.search_seeds is None else self.search_seeds

    @property
    def questions(self) -> int:
        """Of the question set."""
        return round(self.clusters * self.questions_per_cluster)

    @property
    def responses(self) -> int:
        """Sampled and judged of all cells at one evaluation point."""
        return round(self.cells * self.seeds * self.questions * self.samples)


def estimate_noise(matrix: ScoreMatrix) -> Noise:
    """The variance components of a finished sweep; NaN for what its design does not show.

    ``seed`` and ``seed_question`` need cells with two seeds or more, the others two clusters. A component whose
    estimate is negative is 0. Clusters are taken to be of equal size.
    """
    moments, clusters = cell_moments(matrix), matrix.clusters
    several = moments.runs > 1
    noise = float(np.mean((moments.noise * moments.runs)[several])) if several.any() else np.nan
    seed = float(np.mean((moments.seeds * moments.runs)[several])) - noise if several.any() else np.nan
    noise_left = float(np.mean(np.where(several, moments.noise, 0.0)))
    interaction = question_variance(moments, matrix.cell_mean(matrix.loss)) - noise_left if matrix.cells > 1 else np.nan
    sampling = float(np.nanmean(matrix.response_error**2)) if np.isfinite(matrix.response_error).any() else np.nan
    return Noise(
        seed=_root(seed),
        interaction=_root(interaction * clusters),
        seed_question=_root((noise - np.nan_to_num(sampling) / len(matrix.cluster)) * clusters),
        response=_root(float(np.nanmean(matrix.response_sd**2)) if np.isfinite(sampling) else np.nan),
    )


def design_of(matrix: ScoreMatrix) -> Design:
    """The design of a finished sweep; of cells that differ in it, the smallest number of seeds."""
    seeds, search_seeds = int(matrix.runs_per_cell.min()), None
    if matrix.unsearched is not None and not matrix.unsearched.all():
        kept = np.bincount(matrix.cell[held_back(matrix)], minlength=matrix.cells)
        search_seeds = int((matrix.runs_per_cell - kept).min())
        seeds = search_seeds + int(kept.min())
    return Design(
        cells=matrix.cells,
        seeds=seeds,
        search_seeds=search_seeds,
        clusters=matrix.clusters,
        questions_per_cluster=len(matrix.cluster) / matrix.clusters,
        samples=float(matrix.responses.mean()),
    )


def planned_design(seeds: Sequence[int], topics: Sequence[str], samples: float) -> Design:
    """The design of a sweep to come, in which the verdict goes by cells with ``MIN_SEEDS`` seeds where two have them.

    ``seeds`` are those of each cell, ``topics`` those of each question, ``samples`` the responses per question.
    """
    enough = [count for count in seeds if count >= MIN_SEEDS]
    judged = enough if len(enough) > 1 else seeds
    clusters = len(set(topics)) if clustered_by_topic(topics) else len(topics)
    return Design(len(judged), min(judged), clusters, len(topics) / clusters, samples)


def assumed(noise: Noise) -> tuple[Noise, list[str]]:
    """``noise`` with the field's figures where it is NaN, and the names of those."""
    unknown = [name for name, value in asdict(noise).items() if not np.isfinite(value)]
    return replace(noise, **{name: getattr(FIELD, name) for name in unknown}), unknown


def detection_probability(noise: Noise, design: Design, difference: float, *, alpha: float = ALPHA) -> float:
    """Probability of the verdict "found" when one cell is better than all others by ``difference`` points.

    The cell has to be chosen on the choosing seeds and questions, and then to be confirmed against another one on the
    rest, one-sided at ``alpha``. All cells are taken to have the same loss, where most pairs compete; when they are
    equally noisy, this is a lower bound. Components that are NaN count as 0. 0 for designs that can't be confirmed.
    """
    choosing = design.choosing_seeds, choosing_clusters(design.clusters)
    seeds, clusters = design.seeds - choosing[0], design.clusters - choosing[1]
    if design.cells < 2 or seeds < MIN_HELD_BACK or design.clusters < MIN_CLUSTERS:
        return 0.0
    seed, interaction, single = _variances(noise, design)
    if seed + interaction + single == 0:
        return float(difference > 0)
    choice_error = np.sqrt(seed / choosing[0] + interaction / choosing[1] + single / (choosing[0] * choosing[1]))
    chosen = chosen_probability(design.cells, difference / choice_error)

    per_cell = (seed + single / clusters) / seeds
    questions = 2 * (interaction + single / seeds) / clusters
    variance = 2 * per_cell + 2 * interaction / clusters
    spare = 2 * per_cell**2 / (seeds - 1) + (questions**2 / (clusters - 1) if interaction > 0 else 0.0)
    degrees = variance**2 / spare
    confirmed = stats.nct.sf(stats.t.isf(alpha, degrees), degrees, difference / np.sqrt(variance))
    return chosen * float(confirmed)


def detectable_difference(noise: Noise, design: Design, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The difference in points that is found with probability ``power``; infinite where none of up to 100 points is.

    In simulated sweeps with unequal noise and a steep curve over loss (``benchmarks/calibration.py``) it was found in
    65 % of the sweeps with 3 seeds and in 75-80 % of those with 5.
    """

    def missing(difference: float) -> float:
        return power - detection_probability(noise, design, difference, alpha=alpha)

    if missing(100.0) > 0:
        return np.inf
    return float(optimize.brentq(missing, 0.0, 100.0)) if missing(0.0) > 0 else 0.0


def designs_for(
    noise: Noise, design: Design, difference: float, *, alpha: float = ALPHA
) -> dict[str, tuple[Design, float]]:
    """Larger designs that detect ``difference``, each with what it detects: the smallest by ``seeds`` alone, by
    ``questions`` alone and by ``samples`` alone, and of seeds and questions together the one with the ``fewest
    responses``. At most ``MOST_SEEDS`` a cell, ``MOST_QUESTIONS`` times the questions and ``MOST_SAMPLES`` times the
    samples; a way that does not get there is left out.
    """

    def grown(seeds: int, multiple: int, samples: int = 1) -> Design:
        clusters = design.clusters * multiple
        return replace(design, seeds=seeds, clusters=clusters, samples=design.samples * samples)

    def detects(*size: int) -> bool:
        return detection_probability(noise, grown(*size), difference, alpha=alpha) >= POWER

    # Down the staircase: the more seeds, the fewer questions are needed.
    steps = []
    multiple = MOST_QUESTIONS
    for seeds in range(design.seeds, max(MOST_SEEDS, design.seeds) + 1):
        while multiple > 1 and detects(seeds, multiple - 1):
            multiple -= 1
        if multiple < MOST_QUESTIONS or detects(seeds, multiple):
            steps.append((seeds, multiple))
        if multiple == 1:
            break
    more_samples = bisect_left(range(1, MOST_SAMPLES + 1), True, key=lambda more: detects(design.seeds, 1, more)) + 1
    ways: dict[str, tuple[int, ...] | None] = {
        "seeds": next((step for step in steps if step[1] == 1), None),
        "questions": next((step for step in steps if step[0] == design.seeds), None),
        "samples": (design.seeds, 1, more_samples) if more_samples <= MOST_SAMPLES else None,
        "fewest responses": min(steps, key=lambda step: step[0] * step[1], default=None),
    }
    return {
        way: (grown(*step), detectable_difference(noise, grown(*step), alpha=alpha))
        for way, step in ways.items()
        if step
    }


def _variances(noise: Noise, design: Design) -> tuple[float, float, float]:
    """Of seeds, of cell x cluster, and of everything that is new in each run and cluster."""
    seed, interaction, seed_question, response = (
        float(np.nan_to_num(value)) ** 2
        for value in (noise.seed, noise.interaction, noise.seed_question, noise.response)
    )
    return seed, interaction, seed_question + response / (design.samples * design.questions_per_cluster)


def chosen_probability(cells: int, ahead: float) -> float:
    """Probability that the gap between a cell ``ahead`` and one other is the largest among ``cells`` of equal loss.

    ``ahead`` is in units of the standard error of a cell's mean where the pair is chosen. The other gaps are at most
    the range of ``cells`` standard normal variables, whose distribution is David & Nagaraja's (Order Statistics, 2003,
    eq. 2.3.3).
    """
    z, x = np.linspace(-6, 6, 121), np.linspace(-8, 8, 161)
    gap = np.maximum(0.0, ahead + np.sqrt(2) * z)
    inside = stats.norm.cdf(x[:, None] + gap) - stats.norm.cdf(x)[:, None]
    within_range = cells * trapezoid(stats.norm.pdf(x)[:, None] * inside ** (cells - 1), x, axis=0)
    return float(trapezoid(stats.norm.pdf(z) * within_range, z))


def _root(variance: float) -> float:
    return float(np.sqrt(max(0.0, variance))) if np.isfinite(variance) else np.nan
