"""The tables of a search for better minima: gaps between runs or cells of no more loss, looked at in several ways."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from emanalysis.before_after import adjusted
from emanalysis.bootstrap import cell_draws, percentile_interval, run_draws
from emanalysis.comparable import Comparable
from emanalysis.loss_curve import fit_loss_curve
from emanalysis.matched_pairs import cell_moments, differences, ordered_pairs
from emanalysis.max_diff import max_diff
from emanalysis.null_sweep import NullReference
from emanalysis.pareto import membership, pareto_front
from emanalysis.permutation import loss_bins, max_test
from emanalysis.residuals import residual_from_curve
from emanalysis.score_matrix import Ints
from emanalysis.trajectories import common_levels, compare_at_levels, score_at_losses

Rows = list[dict[Any, Any]]

MOST_PAIRS = 300
"""Pairs listed in a table; all are tested and counted."""
MIN_CELLS_PER_BIN = 3
BASELINE = "linear"
"""The schedule the loss-only curve is fitted on, where it has enough cells."""


def max_diffs(runs: pd.DataFrame, scores: tuple[str, ...], losses: tuple[str, ...], keys: list[str]) -> Rows:
    """The largest gap between single runs for every group, score and loss; see ``emanalysis.max_diff``.

    ``runs`` has one row per run and group of ``keys``; those whose loss is not finite are left out. A gap in
    ``misaligned_rate`` is how much lower it is.
    """
    rows: Rows = []
    for key, group in runs.groupby(keys, sort=True):
        for score in (score for score in scores if score in group):
            for loss in losses:
                known = group[group[score].notna() & group[loss].lt(np.inf)]
                if len(known) < 2:
                    continue
                sign = -1.0 if score == "misaligned_rate" else 1.0
                gap = max_diff(known[loss], sign * known[score])
                better, worse = known.iloc[gap.better], known.iloc[gap.worse]
                rows.append(
                    dict(zip(keys, key, strict=True))
                    | {"score": score, "loss": loss, "max_diff": gap.value, "n_runs": len(known)}
                    | {"better": better["name"], "worse": worse["name"]}
                    | {"better_loss": better[loss], "worse_loss": worse[loss]}
                    | {"better_run_id": better["run_id"], "worse_run_id": worse["run_id"]}
                )
    return rows


def pair_table(group: Comparable, margin: float) -> tuple[Rows, int, int]:
    """Pairs of cells of no more loss by p-value, how many there are, and how many have q < 0.05.

    ``p`` is one-sided against "no better"; ``q`` is Benjamini & Hochberg's over all pairs; ``p_equivalent`` is TOST's.
    Intervals are 90 %. With one run a cell the luck of seeds is in none of them.
    """
    moments, loss = cell_moments(group.matrix), group.matrix.cell_mean(group.matrix.loss)
    a, b = ordered_pairs(loss)
    if not len(a):
        return [], 0, 0
    gaps = differences(moments, a, b)
    low, high = gaps.bounds()
    table = pd.DataFrame(
        _named_pair(group, a, b)
        | {"loss_difference": loss[a] - loss[b], "difference": gaps.estimate, "error": gaps.error}
        | {"low": low, "high": high, "p": gaps.p_greater, "q": np.nan, "p_equivalent": gaps.p_equivalent(margin)}
        | {"seeds_better": moments.runs[a], "seeds_worse": moments.runs[b]}
    )
    table["q"] = adjusted(table["p"])
    table = table.sort_values(["p", "difference"], ascending=[True, False])
    return table.head(MOST_PAIRS).to_dict("records"), len(table), int((table["q"] < 0.05).sum())


def matched_pairs(group: Comparable, caliper: float, *, rng: np.random.Generator, draws: int = 2000) -> Rows:
    """Pairs of cells whose log losses differ by at most ``caliper``, largest gap first, with bootstrap intervals.

    Each pair is listed once, better cell first, whichever has the lower loss. ``low, high``: 95 % of draws of seeds,
    question clusters and responses; they are of single pairs, and the first of many is too far out.
    """
    matrix = group.matrix
    loss, score = matrix.cell_mean(matrix.loss), matrix.cell_mean(matrix.run_score)
    a, b = np.nonzero(np.abs(np.log(loss)[:, None] - np.log(loss)) <= caliper)
    once = (score[a] > score[b]) | ((score[a] == score[b]) & (a < b))
    a, b = a[once], b[once]
    order = np.argsort(score[b] - score[a], kind="stable")[:MOST_PAIRS]
    a, b = a[order], b[order]
    if not len(a) or len(np.unique(loss)) < 2:
        return []
    drawn = cell_draws(matrix, rng=rng, draws=draws)
    low, high = percentile_interval(drawn[:, a] - drawn[:, b])
    curve = fit_loss_curve(loss, score)
    table = pd.DataFrame(
        _named_pair(group, a, b)
        | {"loss_difference": loss[a] - loss[b], "explained_by_loss": curve(loss[a]) - curve(loss[b])}
        | {"difference": score[a] - score[b], "low": low, "high": high}
    )
    return table.to_dict("records")


def residual_table(group: Comparable, *, rng: np.random.Generator) -> tuple[Rows, list[str]]:
    """Each schedule against the loss-only curve of the baseline, or of all other schedules; and why some have none."""
    loss, score = group.cells["loss"].to_numpy(float), group.cells["score"].to_numpy(float)
    schedule = group.cells["schedule"].astype(str).to_numpy()
    on_baseline = schedule == BASELINE
    rows: Rows = []
    notes = []
    for name in sorted(set(schedule)):
        tested = schedule == name
        baseline = name != BASELINE and len(np.unique(loss[on_baseline])) >= 4
        used = tested | on_baseline if baseline else np.ones(len(loss), bool)
        try:
            residual = residual_from_curve(loss[used], score[used], tested[used], rng=rng)
        except ValueError as error:
            notes.append(f"{name} against a curve over loss: {error}.")
            continue
        low, high = residual.interval()
        rows.append(
            {"schedule": name, "curve": BASELINE if baseline else "all other schedules"}
            | {"residual": residual.estimate, "low": low, "high": high, "p": residual.p}
            | {"cells": residual.cells, "outside": residual.outside}
        )
    for row, q in zip(rows, adjusted(pd.Series([row["p"] for row in rows], dtype=float)), strict=True):
        row["q"] = q
    return rows, notes


def max_test_table(group: Comparable, *, rng: np.random.Generator) -> Rows:
    """The largest difference between cells tested against seeds, and between schedules against cells."""
    matrix = group.matrix
    cell_loss, cell_score = matrix.cell_mean(matrix.loss), matrix.cell_mean(matrix.run_score)
    schedule = pd.factorize(group.cells["schedule"].astype(str))[0].astype(np.int64)
    schedules = int(schedule.max()) + 1
    cell_bins = loss_bins(cell_loss, MIN_CELLS_PER_BIN)
    rows: Rows = []
    if matrix.cells > 1 and matrix.runs_per_cell.min() > 1:
        test = max_test(matrix.loss, matrix.run_score, matrix.cell, cell_bins[matrix.cell], rng=rng)
        rows.append({"labels": "cells", "units": "runs", **_test_columns(asdict(test))})
    if schedules > 1 and matrix.cells > schedules:
        try:
            test = max_test(cell_loss, cell_score, schedule, loss_bins(cell_loss, schedules), rng=rng)
            rows.append({"labels": "schedules", "units": "cells", **_test_columns(asdict(test))})
        except ValueError:
            # Every schedule keeps to its own losses: nothing to compare at equal loss.
            pass
    return rows


def null_row(luck: NullReference) -> dict[Any, Any]:
    """The largest gap beside those of a null sweep, as a row of ``max_test_table``."""
    return {
        "labels": "cells",
        "units": "null sweep",
        "largest_difference": luck.observed.value,
        "n_units": luck.degrees_of_freedom + 1,
        "p": luck.p,
        "null_mean": float(luck.gaps.mean()),
        "null_95": float(np.quantile(luck.gaps, 0.95)),
        "bins": None,
    }


def pareto_table(group: Comparable, role: NDArray[np.str_], *, rng: np.random.Generator, draws: int = 2000) -> Rows:
    """Every run with its place on the front of low loss and high alignment, and how often draws leave it there.

    ``role`` is a run's part in the pair of the verdict, (R,).
    """
    matrix = group.matrix
    front = pareto_front(matrix.loss, matrix.run_score[None, :])[0]
    share = membership(matrix.loss, run_draws(matrix, rng=rng, draws=draws))
    table = group.runs[["run_id", "name", "schedule", "learning_rate", "seed"]].assign(
        cell=group.cells["cell"].to_numpy()[matrix.cell],
        loss=matrix.loss,
        score=matrix.run_score,
        on_front=front,
        membership=share,
        role=role,
    )
    return table.sort_values("loss").to_dict("records")


def replication(group: Comparable, better: int, worse: int, others: list[Comparable]) -> Rows:
    """The difference of two cells of ``group`` on its own questions, by answer format, and on other question sets.

    ``others`` are groups of the same model and dataset. Intervals are 90 %. What chose the pair is in the rows of the
    own set, not in those of the others.
    """
    chosen = np.isin(group.matrix.cell, [better, worse])
    runs = group.runs["run_id"][chosen]
    is_better = dict(zip(runs, group.matrix.cell[chosen] == better, strict=True))
    rows: Rows = []
    for other in [group, *others]:
        place = other.runs["run_id"].isin(is_better).to_numpy()
        first = other.runs["run_id"][place].map(is_better).to_numpy(bool)
        if first.all() or not first.any():
            continue
        pair = replace(other.matrix.take(runs=place), cell=np.where(first, 0, 1))
        parts = {"all questions": np.ones(len(other.strata), bool)}
        if len(set(other.strata)) > 1:
            parts |= {name: np.array([own == name for own in other.strata]) for name in sorted(set(other.strata))}
        for stratum, questions in parts.items():
            gap = differences(cell_moments(pair.take(questions=questions)), 0, 1)
            low, high = gap.bounds()
            rows.append(
                {"asked": other.question_set, "stratum": stratum, "held_out": other is not group}
                | {"better": group.cells["cell"][better], "worse": group.cells["cell"][worse]}
                | {"difference": float(gap.estimate), "low": float(low), "high": float(high)}
                | {"p": float(gap.p_greater), "questions": int(questions.sum()), "runs": int(place.sum())}
            )
    return rows


def trajectory_tables(group: Comparable, checkpoints: pd.DataFrame) -> tuple[Rows, Rows]:
    """Alignment at equal loss on the way: a row per cell and level, and a test per level with its q-value.

    ``checkpoints`` are rows of ``Records.checkpoints``. Raises ``ValueError`` when the paths share no loss.
    """
    own = checkpoints[(checkpoints["question_set"] == group.question_set) & checkpoints["stratum"].isna()]
    own = own[own["heldout_loss"].gt(0) & own["heldout_loss"].lt(np.inf) & own["aligned"].notna()]
    own = own.sort_values(["run_id", "step"])
    paths = {run: path for run, path in own.groupby("run_id") if len(path) > 1}
    place = np.array([run in paths for run in group.runs["run_id"]])
    if place.sum() < 2:
        raise ValueError("it takes runs that were scored at two steps or more")
    kept = [paths[run] for run in group.runs["run_id"][place]]
    levels = common_levels([path["heldout_loss"].to_numpy(float) for path in kept])
    scores = np.array(
        [
            score_at_losses(path["heldout_loss"].to_numpy(float), path["aligned"].to_numpy(float), levels)
            for path in kept
        ]
    )
    numbers, code = np.unique(group.matrix.cell[place], return_inverse=True)
    tests = compare_at_levels(scores, code, levels)
    labels = group.cells["cell"].to_numpy()[numbers]
    rows = [
        {"loss": test.loss, "cell": label, "aligned": mean, "error": error, "runs": int(runs)}
        for test in tests
        for label, mean, error, runs in zip(labels, test.mean, test.error, np.bincount(code), strict=True)
    ]
    q = adjusted(pd.Series([test.p for test in tests]))
    return rows, [
        {"loss": test.loss, "largest_difference": float(np.ptp(test.mean)), "p": test.p, "q": value}
        for test, value in zip(tests, q, strict=True)
    ]


def _named_pair(group: Comparable, a: Ints, b: Ints) -> dict[str, Any]:
    names = group.cells["cell"].to_numpy()
    return {"better": names[a], "worse": names[b]}


def _test_columns(test: dict[str, Any]) -> dict[str, Any]:
    return {"largest_difference": test.pop("difference"), "n_units": test.pop("units"), **test}
