"""How often each verdict and each p-value is wrong, on simulated sweeps of which the truth is known.

    python benchmarks/calibration.py [--sweeps 500] > benchmarks/results/<date>-calibration.md

A sweep has four learning rates x three schedules whose losses nearly match, several seeds, and questions of several
topics in three answer formats. Scores saturate at 0 and 100 (logistic in log loss), formats and questions fall at
different rates, cells differ in how lucky their seeds are, cells are better on some topics and worse on others, and
responses are sampled. In half of the sweeps alignment follows the loss a run has, in the other half the loss its cell
has on average, so that the measured loss is itself noisy. Alignment at equal loss is the same in all cells, on average
over topics, but for the planted one.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats
from scipy.special import expit

from emanalysis.confirmation import choose, confirm, split
from emanalysis.correlation import indicators, ladder
from emanalysis.matched_pairs import cell_moments, differences
from emanalysis.null_sweep import null_reference
from emanalysis.permutation import loss_bins, max_test
from emanalysis.residuals import residual_from_curve
from emanalysis.score_matrix import Floats, ScoreMatrix
from emanalysis.trajectories import compare_at_levels
from emanalysis.verdict import MARGIN, Outcome, Verdict, decide

LEVELS, SCHEDULES = 4, 3
PLANTED = SCHEDULES + 1
"""The middle schedule at the second lowest loss, where scores are far from both ends."""
CONSERVATIVE = (
    "Two are conservative by design: the confirmation asks for two things at once, and a gap is held against a null "
    "sweep as if luck differed between cells."
)
OUTCOMES: tuple[Outcome, ...] = ("found", "not found", "can't tell")


@dataclass(frozen=True)
class World:
    """Sizes and noises of simulated sweeps. Noise is on the logit scale, where one unit is about 20 points."""

    seeds: int = 5
    topics: int = 8
    formats: int = 3
    samples: int = 10
    seed_sd: float = 0.12
    seed_sd_spread: float = 0.5
    """Standard deviation, over cells, of the log of ``seed_sd``."""
    topic_sd: float = 0.25
    """Of a cell's deviation on a topic."""
    run_topic_sd: float = 0.15
    """Of a run's deviation on a question."""
    loss_sd: float = 0.0015
    slope: float = 50.0
    """Logits per unit of log loss: about 30 points over the 4 % between the lowest and the highest loss."""


WORLDS = {
    "5 seeds, 8 topics x 3 formats": World(),
    "3 seeds, 8 topics x 3 formats": World(seeds=3),
    "5 seeds, 32 topics x 3 formats": World(topics=32),
    "5 seeds, seed luck very unequal": World(seed_sd_spread=1.0),
    "5 seeds, loss noise doubled": World(loss_sd=0.003),
    "12 seeds, 32 topics x 3 formats, little noise": World(seeds=12, topics=32, seed_sd=0.06, topic_sd=0.1),
    "1 seed, null sweep of 10": World(seeds=1, seed_sd_spread=0.0),
    "1 seed, null sweep of 10, seed luck unequal": World(seeds=1),
}


def sweep(world: World, rng: np.random.Generator, *, planted: float = 0.0) -> ScoreMatrix:
    """A sweep in which cell ``PLANTED`` is better by ``planted`` points than the next one, of a little more loss."""
    cells, questions = LEVELS * SCHEDULES, world.topics * world.formats
    mean_loss = np.repeat(np.linspace(1.31, 1.36, LEVELS), SCHEDULES) + rng.normal(0, 0.001, cells)
    # No more loss than the two cells it is to be better than.
    rivals = [PLANTED - 1, PLANTED, PLANTED + 1]
    mean_loss[rivals] = np.sort(mean_loss[rivals])[[1, 0, 2]]
    cell, seed = np.repeat(np.arange(cells), world.seeds), np.tile(np.arange(world.seeds), cells)
    loss = mean_loss[cell] + world.loss_sd * rng.standard_normal(len(cell))
    driver = loss if rng.random() < 0.5 else mean_loss[cell]

    topic = np.repeat(np.arange(world.topics), world.formats)
    answer_format = np.tile(np.arange(world.formats) % 3, world.topics)
    height = np.array([-1.0, 0.2, -0.7])[answer_format] + rng.normal(0, 0.8, world.topics)[topic]
    slope = world.slope * np.array([0.4, 1.6, 1.0])[answer_format] * np.exp(rng.normal(0, 0.3, questions))
    luck = world.seed_sd * np.exp(world.seed_sd_spread * rng.standard_normal(cells))
    logits = height + slope * np.log(driver / 1.335)[:, None]
    logits += world.topic_sd * rng.standard_normal((cells, world.topics))[cell][:, topic]
    logits += (luck[cell] * rng.standard_normal(len(cell)))[:, None]
    logits += world.run_topic_sd * rng.standard_normal(logits.shape)
    if planted:
        own = cell == PLANTED
        expected = expit(height + slope * np.log(mean_loss / 1.335)[:, None]).mean(axis=1)
        target = expit(logits[own]).mean() + expected[PLANTED + 1] - expected[PLANTED] + planted / 100
        logits[own] += optimize.brentq(lambda shift: expit(logits[own] + shift).mean() - min(0.98, target), 0.0, 50.0)
    mean = expit(logits)
    # Beta responses with a third of the variance that all-or-nothing ones would have.
    response_sd = 100 * np.sqrt(mean * (1 - mean) / 3)
    scores = 100 * mean + response_sd / np.sqrt(world.samples) * rng.standard_normal(mean.shape)
    return ScoreMatrix(
        scores=scores.clip(0, 100),
        response_sd=response_sd,
        responses=np.full(mean.shape, float(world.samples)),
        loss=loss,
        cell=cell,
        seed=seed,
        cluster=topic,
    )


def null_sweep(world: World, rng: np.random.Generator, runs: int = 10) -> ScoreMatrix:
    """One cell with many seeds and the average luck."""
    many = sweep(replace(world, seeds=runs, seed_sd_spread=0.0), rng)
    return many.take(runs=many.cell == PLANTED)


def verdicts(world: World, sweeps: int, *, planted: float, stream: int) -> list[Verdict]:
    """The verdicts on that many sweeps; those with one seed a cell get a null sweep."""
    given = []
    for number in range(sweeps):
        rng = np.random.default_rng([stream, number])
        matrix = sweep(world, rng, planted=planted)
        luck = null_reference(matrix, null_sweep(world, rng), rng=rng) if world.seeds == 1 else None
        given.append(decide(matrix, rng=rng, null=luck))
    return given


def verdict_rows(sweeps: int) -> Iterator[list[str]]:
    """A row for each world and planted effect: how often each verdict is given."""
    for name, world in WORLDS.items():
        nothing = verdicts(world, sweeps, planted=0.0, stream=0)
        detectable = float(np.median([verdict.detectable for verdict in nothing]))
        cases = {"none": 0.0, "the margin": MARGIN, "detectable": detectable, "2 x detectable": 2 * detectable}
        for stream, (case, planted) in enumerate(cases.items()):
            given = verdicts(world, sweeps, planted=planted, stream=stream) if stream else nothing
            share = Counter(verdict.outcome for verdict in given)
            right = np.mean([verdict.better == PLANTED for verdict in given])
            outcomes = [f"{100 * share[outcome] / sweeps:.1f} %" for outcome in OUTCOMES]
            yield [name, f"{case} ({planted:.1f})", *outcomes, f"{100 * right:.0f} %" if planted else ""]


def p_values(rng: np.random.Generator) -> dict[str, float]:
    """Every p-value of the analysis once, each on a sweep in which its own null hypothesis is true."""
    flat = sweep(World(slope=0.0), rng)
    shifted = replace(flat, scores=flat.scores + MARGIN * (flat.cell == 0)[:, None])
    choosing, confirming = split(flat, rng=rng)
    on_flat = confirm(confirming, choose(choosing))
    steep = sweep(World(), rng)
    choosing, confirming = split(steep, rng=rng)
    on_steep = confirm(confirming, choose(choosing))
    loss, score = steep.cell_mean(steep.loss), steep.cell_mean(steep.run_score)
    schedule = np.tile(np.arange(SCHEDULES), LEVELS)

    # Cells that differ in nothing but their loss; alike in how lucky their seeds are, or not.
    lucky, alike = (sweep(World(topic_sd=0.0, seed_sd_spread=spread), rng) for spread in (0.5, 0.0))
    single = World(seeds=1)

    def cells_beyond_seeds(matrix: ScoreMatrix) -> float:
        bins = loss_bins(matrix.cell_mean(matrix.loss), 3)[matrix.cell]
        return max_test(matrix.loss, matrix.run_score, matrix.cell, bins, rng=rng, permutations=199).p

    one_loss = compare_at_levels(flat_scores(rng), np.repeat(np.arange(4), 5), np.array([1.3]))[0]
    level = sweep(World(slope=0.0, seed_sd_spread=0.0), rng)
    flat_loss, flat_score = level.cell_mean(level.loss), level.cell_mean(level.run_score)
    predictors = [("loss", np.log(flat_loss)[:, None]), ("schedule", indicators([str(s) for s in schedule]))]
    return {
        "pair, no better": float(differences(cell_moments(flat), 0, 1).p_greater),
        "pair, better by the margin or more (TOST)": float(differences(cell_moments(shifted), 0, 1).p_less(MARGIN)),
        "confirmation, no better; no slope over loss": float(on_flat.score.p_greater),
        "confirmation, no better beyond loss; no slope": float(on_flat.beyond_loss.p_greater),
        "confirmation, both; alignment falls with loss": on_steep.p,
        "largest gap, cells no different beyond seeds": cells_beyond_seeds(alike),
        "the same, cells differ in how lucky seeds are": cells_beyond_seeds(lucky),
        "largest gap, schedules no different beyond cells": max_test(
            loss, score, schedule, loss_bins(loss, SCHEDULES), rng=rng, permutations=199
        ).p,
        "largest gap against a null sweep": null_reference(
            sweep(single, rng), null_sweep(single, rng), rng=rng, simulations=199
        ).p,
        "schedule on the curve of the others": residual_from_curve(loss, score, schedule == 1, rng=rng).p,
        "cells equal at one loss (trajectories)": one_loss.p,
        "schedule adds nothing to R-squared": ladder(flat_score, predictors, rng=rng, draws=2)[1].p,
    }


def flat_scores(rng: np.random.Generator) -> Floats:
    """(20, 1) scores of 4 cells x 5 runs with equal means and unequal spread."""
    return 50 + (np.repeat([1.0, 1.5, 2.0, 3.0], 5) * rng.standard_normal(20))[:, None]


def p_value_rows(sweeps: int) -> Iterator[list[str]]:
    """A row for each p-value: how often it is small, and its distance from the uniform distribution."""
    drawn = [p_values(np.random.default_rng([100, number])) for number in range(sweeps)]
    for name in drawn[0]:
        values = np.array([row[name] for row in drawn])
        shares = [f"{100 * np.mean(values <= level):.1f} %" for level in (0.01, 0.05, 0.1, 0.5)]
        distance = stats.kstest(values, "uniform")
        yield [name, *shares, f"{distance.statistic:.3f}", f"{distance.pvalue:.2g}"]


def print_table(title: str, header: Sequence[str], rows: Iterator[list[str]]) -> None:
    """One Markdown table, row by row as they come."""
    print(f"\n## {title}\n\n| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=500, help="simulated sweeps per row")
    sweeps = parser.parse_args().sweeps
    began = time.process_time()
    print(f"# Calibration of `better_minima` on {sweeps} simulated sweeps per row")
    print_table(
        "Verdicts by planted effect (points)",
        ["sweep", "planted", *OUTCOMES, "planted cell chosen"],
        verdict_rows(sweeps),
    )
    print_table(
        "P-values under their null hypotheses",
        ["p-value", "<= 0.01", "<= 0.05", "<= 0.1", "<= 0.5", "KS distance", "KS p"],
        p_value_rows(sweeps),
    )
    print(f"\n{CONSERVATIVE}")
    print(f"\n{time.process_time() - began:.0f} s of one core.")


if __name__ == "__main__":
    main()
