"""How closely alignment follows the loss, by model, dataset, question set and answer format."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from emanalysis.analysis import Analysis, Figure, Result
from emanalysis.comparable import GROUP, LOSS_NAMES, LOSSES, SCORES, WHOLE, cells, scored_runs, settings
from emanalysis.correlation import (
    Estimate,
    indicators,
    ladder,
    leave_one_out,
    line,
    partial,
    pearson,
    slope,
    spearman,
)
from emanalysis.plot import BASE_LINE, INK, blank, hover, looks, number, panels, text
from emanalysis.records import Records
from emanalysis.score_matrix import group_mean

MIN_RUNS = 4
"""An interval of a correlation needs more than 3 points."""


def compute(records: Records, *, seed: int) -> Result:
    """Correlations, slopes and ladders of every group of finished runs."""
    runs = scored_runs(records)
    runs = runs.assign(cell=cells(runs, settings(records))[0])
    runs = runs.dropna(subset=[loss for loss in LOSSES if runs[loss].notna().any()], how="all")
    sizes = runs.groupby(GROUP, dropna=False)["run_id"].transform("nunique")
    small = sorted(set(runs.loc[sizes < MIN_RUNS, "dataset"].dropna()))
    runs = runs[sizes >= MIN_RUNS]
    if runs.empty:
        most = int(sizes.max()) if len(sizes) else 0
        return {"reason": f"needs at least {MIN_RUNS} finished, scored runs of one model and dataset; there are {most}"}

    associations, rungs, points = [], [], []
    for key, group in runs.groupby(GROUP, sort=True):
        named = dict(zip(GROUP, key, strict=True))
        for score in (score for score in SCORES if score in group):
            for loss in LOSSES:
                for which, chosen in _with_and_without(_known(group, score, loss)):
                    if len(chosen) >= MIN_RUNS:
                        row = {"score": score, "loss": loss, "runs": which}
                        associations.append(named | row | association(chosen, score, loss))
        loss = "heldout_loss" if group["heldout_loss"].notna().any() else "heldout_loss_per_sequence"
        kept = _known(group, "aligned", loss)
        if len(kept) >= MIN_RUNS:
            rng = np.random.default_rng(seed)
            rungs += [named | {"loss": loss, **rung} for rung in r2_ladder(kept, loss, rng)]
            points += _points(kept, loss)
    notes = [f"Groups of fewer than {MIN_RUNS} runs were left out ({', '.join(small)})."] if small else []
    told = [rung for rung in rungs if rung["n_cells"] > rung["parameters"] + 1]
    if len(told) < len(rungs):
        notes.append(
            f"Of {len(rungs)} models of what explains alignment, {len(rungs) - len(told)} were left out: one of p "
            "parameters needs p + 2 configurations, or it fits them whatever they are."
        )
    return {
        "answer": _answer(associations),
        "associations": associations,
        "r2_ladder": told,
        "points": points,
        "notes": notes,
    }


def association(runs: pd.DataFrame, score: str, loss: str) -> dict[str, Any]:
    """Statistics of ``score`` against ``loss`` over rows of runs; intervals are 95 % and count cells, not runs."""
    x, y = runs[loss].to_numpy(float), runs[score].to_numpy(float)
    log = np.log(x)
    code = pd.factorize(runs["cell"])[0].astype(np.int64)
    count = int(code.max()) + 1
    integral = runs["learning_rate_integral"].to_numpy(float)
    logged = pearson(log, y, cells=count)
    without = leave_one_out(log, y)
    shift = np.abs(without - logged.value)
    defined = bool(np.isfinite(shift).any())
    one_percent = slope(log, y, code)
    return {
        "n_runs": len(runs),
        "n_cells": count,
        **_columns("pearson", pearson(x, y, cells=count)),
        **_columns("pearson_log", logged),
        **_columns("spearman", spearman(x, y, cells=count)),
        # Per 1 % more loss, which is what differences between runs are made of.
        **_columns("slope_per_percent", Estimate(*(value / 100 for value in asdict(one_percent).values()))),
        "residual_sd": float(np.std(y - line(log, y), ddof=2)),
        "without_one_low": float(np.nanmin(without)) if defined else np.nan,
        "without_one_high": float(np.nanmax(without)) if defined else np.nan,
        "most_influential": runs["name"].iloc[int(np.nanargmax(shift))] if defined else None,
        **_columns(
            "partial_given_log_learning_rate_integral",
            partial(log, y, np.log(integral), cells=count)
            if (integral > 0).all()
            else Estimate(np.nan, np.nan, np.nan),
        ),
    }


def r2_ladder(runs: pd.DataFrame, loss: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """R-squared of alignment on log loss, with optimisers added, then schedules; over means of cells."""
    code = pd.factorize(runs["cell"])[0].astype(np.int64)
    first = runs.groupby(code)[["optimizer", "schedule"]].first().astype(str)
    predictors = [
        ("log loss", np.log(group_mean(runs[loss].to_numpy(float), code))[:, None]),
        ("+ optimiser", indicators(first["optimizer"].tolist())),
        ("+ schedule", indicators(first["schedule"].tolist())),
    ]
    rungs = ladder(group_mean(runs["aligned"].to_numpy(float), code), predictors, rng=rng)
    rows = []
    for rung in rungs:
        row = asdict(rung)
        low, high = row.pop("r2_interval")
        rows.append(row | {"r2_low": low, "r2_high": high, "n_cells": int(code.max()) + 1})
    return rows


def _known(runs: pd.DataFrame, score: str, loss: str) -> pd.DataFrame:
    # A run that diverged has a loss that is not finite; logarithms are taken of the others.
    return runs[runs[score].notna() & runs[loss].gt(0) & runs[loss].lt(np.inf)]


def _with_and_without(runs: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    trained = runs[~runs["under_trained"].astype(bool)]
    return [("all", runs), ("without under-trained", trained)] if len(trained) < len(runs) else [("all", runs)]


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _points(runs: pd.DataFrame, loss: str) -> list[dict[Any, Any]]:
    expected = line(np.log(runs[loss].to_numpy(float)), runs["aligned"].to_numpy(float))
    columns = ["run_id", "name", *GROUP, "schedule", "learning_rate", "seed", "aligned", "under_trained"]
    base = runs.get("base_aligned", np.nan)
    table = runs[columns].assign(loss=runs[loss], expected=expected, base_aligned=base)
    return table.to_dict("records")


def _answer(associations: list[dict[str, Any]]) -> str:
    rows = [
        row
        for row in associations
        if row["score"] == "aligned"
        and row["runs"] == "all"
        and row["loss"] in ("heldout_loss", "heldout_loss_per_sequence")
    ]
    whole: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        if row["stratum"] == WHOLE:
            whole.setdefault((row["model"], row["dataset"], row["question_set"]), row)
    sentences = []
    for (model, dataset, question_set), row in whole.items():
        sentence = (
            f"On {question_set} ({model}, {dataset}), alignment and log held-out loss correlate at "
            f"{number(row['pearson_log'], '.2f')} over {row['n_runs']} runs"
        )
        if np.isfinite(row["pearson_log_low"]):
            bounds = f"{number(row['pearson_log_low'], '.2f')} to {number(row['pearson_log_high'], '.2f')}"
            sentence += f" (95% interval {bounds})"
        strata = {
            other["stratum"]: number(other["pearson_log"], ".2f")
            for other in rows
            if other["stratum"] != WHOLE
            and other["loss"] == row["loss"]
            and (other["model"], other["dataset"], other["question_set"]) == (model, dataset, question_set)
        }
        if strata:
            sentence += "; by answer format: " + ", ".join(f"{name} {value}" for name, value in strata.items())
        sentences.append(sentence + ".")
    return " ".join(sentences)


def figures(result: Result) -> list[Figure]:
    """Alignment over loss, its correlation by answer format, and the ladder."""
    points = pd.DataFrame(result["points"])
    drawn = [_scatter(points)]
    associations = pd.DataFrame(result["associations"])
    drawn.append(_forest(associations))
    if result["r2_ladder"]:
        drawn.append(_ladder_figure(pd.DataFrame(result["r2_ladder"])))
    return drawn


def _scatter(points: pd.DataFrame) -> Figure:
    whole = points[points["stratum"] == WHOLE] if (points["stratum"] == WHOLE).any() else points
    groups = panels(whole, ("model", "dataset", "question_set"))[:6]
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    plot = blank(
        "held-out loss",
        "aligned, 0–100",
        rows=rows,
        columns=columns,
        titles=[name for name, _ in groups] if len(groups) > 1 else [],
        height=160 + 300 * rows,
        vertical_spacing=0.3 / rows,
    )
    styles = looks(whole["schedule"])
    shown: set[str] = set()
    for place, (_, group) in enumerate(groups):
        panel = {"row": place // columns + 1, "col": place % columns + 1}
        line = group.sort_values("loss")
        plot.add_trace(
            go.Scatter(
                x=line["loss"], y=line["expected"], mode="lines", line={"color": INK, "width": 1.5}, hoverinfo="skip",
                name="fit in log loss", legendgroup="fit", showlegend=place == 0,
            ),
            **panel,
        )  # fmt: skip
        for schedule, (color, symbol) in styles.items():
            own = group[group["schedule"].astype(str) == schedule]
            if own.empty:
                continue
            plot.add_trace(
                go.Scatter(
                    x=own["loss"],
                    y=own["aligned"],
                    mode="markers",
                    marker={
                        "symbol": [f"{symbol}-open" if under else symbol for under in own["under_trained"]],
                        "size": 9,
                        "color": color,
                        "opacity": 0.85,
                    },
                    name=text(schedule),
                    legendgroup=schedule,
                    showlegend=schedule not in shown,
                    hoverinfo="text",
                    hovertext=hover(own.rename(columns={"loss": "heldout_loss"})),
                    customdata=own["run_id"],
                ),
                **panel,
            )
            shown.add(schedule)
        base = group["base_aligned"].dropna()
        if len(base):
            plot.add_hline(base.iloc[0], line=BASE_LINE, **panel)
    plot.update_xaxes(type="log", nticks=6)
    return Figure(
        title="Alignment against held-out loss",
        reading="Each point is a run, the line a straight fit in log loss; runs above it are better aligned than their "
        "loss lets expect. Hollow marks are under-trained, the dotted level is the base model.",
        caveat="Learning rates move loss and alignment together, so most of the trend is one setting; a point off the "
        "line may be luck of its seed.",
        plot=plot,
        table="points",
    )


def _forest(associations: pd.DataFrame) -> Figure:
    rows = associations[(associations["score"] == "aligned") & (associations["runs"] == "all")]
    rows = rows.assign(group=[" · ".join(map(str, key)) for key in zip(*(rows[name] for name in GROUP), strict=True)])
    order = list(dict.fromkeys(rows["group"]))[:24]
    rows = rows[rows["group"].isin(order)]
    plot = blank("Pearson correlation with log loss", "", height=150 + 44 * len(order))
    styles = looks(LOSS_NAMES.values())
    present = [loss for loss in LOSSES if (rows["loss"] == loss).any()]
    for place, loss in enumerate(present):
        own = rows[rows["loss"] == loss]
        color, symbol = styles[LOSS_NAMES[loss]]
        y = own["group"].map({group: row for row, group in enumerate(order)})
        plot.add_trace(
            go.Scatter(
                x=own["pearson_log"],
                y=y + (place - (len(present) - 1) / 2) * 0.6 / len(present),
                error_x={
                    "type": "data", "symmetric": False, "array": own["pearson_log_high"] - own["pearson_log"],
                    "arrayminus": own["pearson_log"] - own["pearson_log_low"], "thickness": 1.5, "width": 0,
                },
                mode="markers",
                marker={"color": color, "symbol": symbol, "size": 8},
                name=LOSS_NAMES[loss],
                hoverinfo="text",
                hovertext=[
                    f"<b>{text(row['group'])}</b><br>{LOSS_NAMES[loss]}: r {number(row['pearson_log'], '.2f')} "
                    f"({number(row['pearson_log_low'], '.2f')} to {number(row['pearson_log_high'], '.2f')})<br>"
                    f"Spearman {number(row['spearman'], '.2f')}, {row['n_runs']} runs of {row['n_cells']} cells<br>"
                    f"without one run: {number(row['without_one_low'], '.2f')} to "
                    f"{number(row['without_one_high'], '.2f')}"
                    for row in own.to_dict("records")
                ],
            )
        )  # fmt: skip
    shared = [name for name in GROUP if rows[name].nunique() == 1]
    labels = rows.drop_duplicates("group").set_index("group")
    shown = [name for name in GROUP if name not in shared] or ["stratum"]
    ticks = [text(" · ".join(str(labels.loc[group, name]) for name in shown)) for group in order]
    plot.update_yaxes(tickvals=list(range(len(order))), ticktext=ticks, autorange="reversed")
    plot.update_xaxes(range=[-1.05, 1.05])
    return Figure(
        title="Correlation of loss and alignment, by answer format",
        reading="The further right, the more alignment goes down as the loss does; bars are 95 % intervals.",
        caveat="Intervals take cells as independent draws of settings, which a grid is not; one run far from the rest "
        "can make a correlation, see the range without one run.",
        plot=plot,
        table="associations",
    )


def _ladder_figure(rungs: pd.DataFrame) -> Figure:
    rows = rungs[rungs["stratum"] == WHOLE] if (rungs["stratum"] == WHOLE).any() else rungs
    plot = blank("what the model knows", "share of variance explained (R²)", height=380)
    groups = [" · ".join(key) for key in zip(rows["model"], rows["dataset"], rows["question_set"], strict=True)]
    rows = rows.assign(group=groups)
    for group, (color, _) in looks(groups).items():
        own = rows[rows["group"] == group]
        plot.add_trace(
            go.Bar(
                x=own["added"],
                y=own["r2"],
                error_y={
                    "type": "data", "symmetric": False, "array": (own["r2_high"] - own["r2"]).clip(lower=0),
                    "arrayminus": (own["r2"] - own["r2_low"]).clip(lower=0), "color": INK, "thickness": 1.5,
                },
                marker={"color": color},
                name=text(group),
                hoverinfo="text",
                hovertext=[
                    f"<b>{text(row['added'])}</b><br>R² {number(row['r2'], '.2f')}, adjusted "
                    f"{number(row['adjusted_r2'], '.2f')}<br>F test of what was added: p {number(row['p'], '.2g')}<br>"
                    f"{row['parameters']} parameters, {row['n_cells']} cells"
                    for row in own.to_dict("records")
                ],
            )
        )  # fmt: skip
    plot.update_yaxes(range=[0, 1.05])
    return Figure(
        title="What explains alignment besides the loss",
        reading="Each step adds settings to a linear model of the cells' alignment; what loss leaves unexplained, "
        "settings may explain.",
        caveat="R² grows with every parameter added; the F test under the pointer says whether by more than chance.",
        plot=plot,
        table="r2_ladder",
    )


loss_vs_alignment = Analysis(
    title="Loss against alignment",
    question="How closely does alignment follow the loss?",
    compute=compute,
    figures=figures,
    order=10,
)
