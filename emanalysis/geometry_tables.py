"""Tables of the minima's geometry: what was measured, joined with the runs it was measured on."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from emanalysis.comparable import Comparable, cells, comparable, settings
from emanalysis.correlation import spearman
from emanalysis.disagreement import disagreement, squared_differences
from emanalysis.line_barrier import Barrier, alignment_barrier, excess, loss_barrier
from emanalysis.plot import evenly
from emanalysis.records import Records
from emanalysis.run_pairs import RELATIONS, relations
from emanalysis.score_matrix import ScoreMatrix
from emanalysis.update_clusters import cluster
from emtrain import names

MARGIN = 0.05
"""Share of what training took off the loss that a barrier has to exceed to count as one."""
RUNS_COMPARED = 300
"""Runs of a group whose answers are compared pair by pair; of more, these are spread evenly over the losses."""
BARRIER, NONE, UNKNOWN = "barrier", "no barrier", "can't tell"
PAIR, GROUP = list(names.PAIR), ["model", "dataset"]


def pairs_table(records: Records) -> pd.DataFrame:
    """One row per pair of runs with anything measured between them: ``names.PAIR``, how they differ, and their scores.

    ``relation`` (``RELATIONS``), ``same_seed``; ``name, loss, aligned`` of both with ``_a`` and ``_b``; ``base_loss``
    before fine-tuning; and the columns of ``updates``. Pairs with a run that the sweep has no more are left out.
    """
    tables = records.geometry
    found = pd.concat([tables[table][PAIR] for table in ("losses", "updates")]).drop_duplicates(ignore_index=True)
    runs = records.runs.set_index("run_id")
    found = found[found["run_a"].isin(runs.index) & found["run_b"].isin(runs.index)]
    if found.empty:
        return found
    for side in ("a", "b"):
        own = runs.loc[found[f"run_{side}"]]
        found[[f"name_{side}", f"loss_{side}", f"aligned_{side}"]] = own[["name", "heldout_loss", "aligned"]].to_numpy()
    own = runs.loc[found["run_a"]]
    found[GROUP] = own[GROUP].to_numpy()
    found["same_seed"] = own["seed"].to_numpy() == runs.loc[found["run_b"], "seed"].to_numpy()
    start = records.checkpoints[records.checkpoints["step"] == 0].groupby("run_id")["heldout_loss"].first()
    found["base_loss"] = found["run_a"].map(start)
    found["relation"] = _relation(records, found)
    numbers = ["loss_a", "loss_b", "aligned_a", "aligned_b"]
    return found.astype(dict.fromkeys(numbers, float)).merge(tables["updates"], on=PAIR, how="left")


def _relation(records: Records, found: pd.DataFrame) -> list[str]:
    measured = records.runs[records.runs["run_id"].isin([*found["run_a"], *found["run_b"]])].reset_index(drop=True)
    matrix = relations(measured, settings(records))
    place = {run_id: number for number, run_id in enumerate(measured["run_id"])}
    return [matrix[place[a], place[b]] for a, b in zip(found["run_a"], found["run_b"], strict=True)]


def barriers_table(records: Records, pairs: pd.DataFrame, *, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The pairs with a line between them and their barriers, and the points of the lines.

    ``loss_barrier`` and ``aligned_fall`` (the barrier of alignment, in points) with ``_low, _high, _at``; the excess
    halfway as ``loss_middle`` and ``aligned_middle``; ``share``: the loss barrier as a share of what training took off
    the loss, with interval; ``finding``: ``BARRIER`` where all of that interval is above ``MARGIN``, ``NONE`` where
    all is below, else ``UNKNOWN``. Points: ``names.LINE, heldout_loss, aligned`` and what each has above (``loss``) or
    below (alignment) the straight line between the ends.
    """
    losses = dict(iter(records.geometry["losses"].groupby(PAIR)))
    responses = dict(iter(records.geometry["responses"].groupby(PAIR)))
    rows: list[dict[Any, Any]] = []
    points = []
    for pair in pairs.to_dict("records"):
        key = tuple(pair[column] for column in PAIR)
        if key not in losses:
            continue
        rng = np.random.default_rng((seed, len(rows)))
        row, curve = _loss_line(losses[key], pair, rng)
        if key in responses:
            fall, aligned = _aligned_line(responses[key], rng)
            row |= fall
            curve = curve.merge(aligned, on="t", how="outer")
        rows.append(pair | row)
        points.append(curve.assign(**{name: pair[name] for name in (*PAIR, "name_a", "name_b", "relation", *GROUP)}))
    lines = pd.concat(points, ignore_index=True) if points else pd.DataFrame()
    return pd.DataFrame(rows), lines


def _loss_line(
    rows: pd.DataFrame, pair: Mapping[Any, Any], rng: np.random.Generator
) -> tuple[dict[str, Any], pd.DataFrame]:
    wide = rows.pivot_table(index="t", columns="row", values="loss").sort_index()
    tokens = rows.groupby("row")["tokens"].first().loc[wide.columns].to_numpy(float)
    t, losses = wide.index.to_numpy(float), wide.to_numpy(float)
    found = loss_barrier(t, losses, tokens, rng=rng)
    per_token = losses.sum(axis=1) / tokens.sum()
    learnt = pair["base_loss"] - (per_token[0] + per_token[-1]) / 2
    share = [end / learnt if learnt > 0 else np.nan for end in (found.height, found.low, found.high)]
    finding = BARRIER if share[1] > MARGIN else NONE if share[2] < MARGIN else UNKNOWN
    described: dict[str, Any] = _columns("loss_barrier", found) | {
        "loss_middle": found.middle,
        "rows": len(tokens),
        "finding": finding,
    }
    described |= dict(zip(("share", "share_low", "share_high"), share, strict=True))
    described |= {"measured_loss_a": per_token[0], "measured_loss_b": per_token[-1]}
    return described, pd.DataFrame({"t": t, "heldout_loss": per_token, "loss_excess": excess(t, per_token)})


def _aligned_line(rows: pd.DataFrame, rng: np.random.Generator) -> tuple[dict[str, Any], pd.DataFrame]:
    """Of the judge with most scores; questions that have no score at some point are left out."""
    judge = rows.groupby("judge")["aligned"].count().idxmax()
    of_judge = rows[(rows["judge"] == judge) & rows["aligned"].notna()]
    asked = ["question_set", "question_id"]
    by_question = of_judge.groupby(["t", *asked])["aligned"]
    tables = [part.unstack(asked) for part in (by_question.mean(), by_question.std(), by_question.count())]
    scored = tables[0].columns[tables[0].notna().all()]
    if len(tables[0]) < 3 or scored.empty:
        return {}, pd.DataFrame({"t": [], "aligned": [], "aligned_below": []})
    mean, sd, count = (table[scored].to_numpy(float) for table in tables)
    topics = of_judge.drop_duplicates(asked).set_index(asked).loc[scored, "topic"]
    points = ScoreMatrix(
        scores=mean,
        response_sd=sd,
        responses=count,
        loss=np.ones(len(mean)),
        cell=np.arange(len(mean)),
        seed=np.zeros(len(mean), np.int64),
        cluster=pd.factorize(topics)[0].astype(np.int64),
    )
    t = tables[0].index.to_numpy(float)
    found = alignment_barrier(t, points, rng=rng)
    fall: dict[str, Any] = _columns("aligned_fall", found) | {
        "aligned_middle": found.middle,
        "aligned_middle_low": found.middle_low,
        "aligned_middle_high": found.middle_high,
        "questions": len(scored),
    }
    below = excess(t, -points.run_score)
    return fall, pd.DataFrame({"t": t, "aligned": points.run_score, "aligned_below": below})


def _columns(name: str, found: Barrier) -> dict[str, float]:
    return {name: found.height, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_at": found.at}


def relations_table(lines: pd.DataFrame) -> pd.DataFrame:
    """One row per relation, of the pairs with a line: how many, what was found, and means with 95 % t intervals.

    Pairs share runs, so the intervals are somewhat too narrow; NaN below three pairs.
    """
    rows = []
    for relation in RELATIONS:
        own = lines[lines["relation"] == relation]
        if own.empty:
            continue
        row: dict[str, object] = {"relation": relation, "pairs": len(own)}
        row |= {finding: int((own["finding"] == finding).sum()) for finding in (BARRIER, NONE, UNKNOWN)}
        for column in ("loss_barrier", "share", "aligned_fall", "aligned_middle", "cosine", "column_overlap"):
            values = own[column].dropna() if column in own else pd.Series(dtype=float)
            row |= dict(zip((column, f"{column}_low", f"{column}_high"), _mean(values), strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def _mean(values: pd.Series) -> tuple[float, float, float]:
    mean = float(values.mean()) if len(values) else np.nan
    if len(values) < 3 or values.std() == 0:
        return mean, np.nan, np.nan
    low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
    return mean, float(low), float(high)


def disagreement_table(records: Records, *, seed: int) -> pd.DataFrame:
    """One row per group of comparable runs and relation: how far two runs' answers to a question are apart."""
    rows = []
    for number, group in enumerate(comparable(records)):
        matrix, runs = _some(group)
        squares = squared_differences(matrix)
        kinds = relations(runs, settings(records))
        for relation in RELATIONS:
            rng = np.random.default_rng((seed, number))
            found = disagreement(squares, matrix, kinds == relation, rng=rng)
            if found.pairs:
                counted = {"runs": len(runs), "questions": matrix.scores.shape[1], "relation": relation}
                rows.append(group.key | counted | found.__dict__)
    return pd.DataFrame(rows)


def _some(group: Comparable) -> tuple[ScoreMatrix, pd.DataFrame]:
    chosen = np.zeros(len(group.runs), bool)
    chosen[evenly(np.argsort(group.matrix.loss, kind="stable").tolist(), RUNS_COMPARED)] = True
    return group.matrix.take(runs=chosen), group.runs[chosen].reset_index(drop=True)


def sharpness_table(records: Records) -> pd.DataFrame:
    """One row per run with a measured ball: rise in held-out loss ``random`` (mean over directions) and ``uphill``.

    Each with the length of its step, as a share of the update's norm.
    """
    measured = records.geometry["sharpness"]
    if measured.empty:
        return pd.DataFrame()
    means = measured.groupby(["run_id", "step", "kind"])[["heldout_loss", "radius"]].mean().unstack("kind")
    by_kind, radius = means["heldout_loss"], means["radius"]
    spread = measured[measured["kind"] == "random"].groupby(["run_id", "step"])["heldout_loss"].std()
    rises = pd.DataFrame(
        {
            "random": by_kind["random"] - by_kind["none"],
            "random_sd": spread,
            "random_radius": radius["random"],
            "uphill": by_kind["adversarial"] - by_kind["none"],
            "uphill_radius": radius["adversarial"],
        }
    ).reset_index()
    columns = ["run_id", "name", *GROUP, "schedule", "optimizer", "learning_rate", "seed", "heldout_loss", "aligned"]
    return rises.merge(records.runs[columns], on="run_id")


def sharpness_correlations(balls: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rho of each kind of sharpness with alignment and with held-out loss, per model and dataset."""
    rows = []
    for group, runs in balls.groupby(GROUP):
        for kind in ("random", "uphill"):
            for against in ("aligned", "heldout_loss"):
                known = runs[[kind, against]].dropna()
                if len(known) >= 4:
                    x, y = known[kind].to_numpy(float), known[against].to_numpy(float)
                    rho = spearman(x, y, cells=len(known))
                    row = {"sharpness": kind, "against": against, "runs": len(known), "rho": rho.value}
                    rows.append(dict(zip(GROUP, group, strict=True)) | row | {"low": rho.low, "high": rho.high})
    return pd.DataFrame(rows)


def clusters_tables(records: Records, pairs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Groups of runs by the direction of their updates: one row per model and dataset, and one per run.

    A group of runs is clustered where the angles between all of them were measured. ``by_seed, by_settings``: the
    adjusted Rand index of the clusters with the runs' seeds and with their settings.
    """
    groups, members = [], []
    for key, runs, cosines in _squares(records, pairs):
        found = cluster(cosines)
        if found is None:
            continue
        cell, labels = cells(runs, settings(records))
        named: dict[str, Any] = dict(zip(GROUP, key, strict=True))
        seeds = pd.factorize(runs["seed"])[0].astype(np.int64)
        agreement = {"by_seed": found.agreement(seeds), "by_settings": found.agreement(cell)}
        groups.append(
            {**named, "runs": len(runs), "clusters": found.groups, "silhouette": found.silhouette, **agreement}
        )
        described = runs[["run_id", "name", "seed"]].assign(**named, settings=[labels[place] for place in cell])
        members.append(described.assign(cluster=found.label, place=np.argsort(found.order)))
    return pd.DataFrame(groups), pd.concat(members, ignore_index=True) if members else pd.DataFrame()


def _squares(records: Records, pairs: pd.DataFrame) -> Iterator[tuple[tuple[str, str], pd.DataFrame, np.ndarray]]:
    """Model and dataset, runs, and (N, N) cosines between their updates, of the runs all of whose cosines are known."""
    known = pairs.dropna(subset=["cosine"]) if "cosine" in pairs else pairs[:0]
    for key, own in known.groupby(GROUP):
        wide = own.pivot_table(index="run_a", columns="run_b", values="cosine", sort=False)
        ids = records.runs.loc[records.runs["run_id"].isin([*own["run_a"], *own["run_b"]]), "run_id"]
        square = wide.reindex(index=ids, columns=ids).to_numpy(float)
        square = np.where(np.isnan(square), square.T, square)
        np.fill_diagonal(square, 1)
        whole = ~np.isnan(square).any(axis=1)
        while not whole.all():
            # Runs chosen in different calls may lack an angle between them: the one that lacks most goes first.
            worst = int(np.isnan(square).sum(axis=1).argmax())
            square, ids = np.delete(np.delete(square, worst, 0), worst, 1), ids.drop(ids.index[worst])
            whole = ~np.isnan(square).any(axis=1)
        runs = records.runs.set_index("run_id").loc[ids].reset_index()
        yield (str(key[0]), str(key[1])), runs, square
