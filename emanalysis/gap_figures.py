"""Figures of the search for better minima, drawn from its tables."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from emanalysis.analysis import Figure, Result
from emanalysis.plot import COLORS, INK, blank, hover, looks, number, panels, text

BEYOND = {"runs": "the luck of seeds", "cells": "the scatter of cells", "null sweep": "a null sweep"}
"""What the units of a test of the maximum stand for."""
MOST_COLOURED = 8
"""Configurations of one schedule that the legend of a figure has room for."""


def _titles(rows: pd.DataFrame) -> pd.Series:
    """What tells the groups of a table apart, for people; empty where there is one group."""
    keys = [key for key in ("model", "dataset", "question_set", "judge") if rows[key].nunique() > 1]
    return rows[keys].astype(str).agg(" · ".join, axis=1) if keys else pd.Series("", index=rows.index)


def plane_figure(runs: pd.DataFrame) -> Figure:
    """The runs in the plane of loss and alignment: rows of ``pareto_table``."""
    groups = panels(runs, ("model", "dataset", "question_set"))[:6]
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    plot = blank(
        "held-out loss",
        "aligned, 0–100",
        rows=rows,
        columns=columns,
        titles=[name for name, _ in groups] if len(groups) > 1 else [],
        height=160 + 320 * rows,
        vertical_spacing=0.3 / rows,
    )
    # Colours tell schedules apart, or what else differs between runs of one schedule.
    kind = "schedule" if runs["schedule"].nunique() > 1 or runs["cell"].nunique() > MOST_COLOURED else "cell"
    styles = looks(runs[kind])
    shown: set[str] = set()
    for place, (_, group) in enumerate(groups):
        panel = {"row": place // columns + 1, "col": place % columns + 1}
        front = group[group["on_front"]].sort_values("loss")
        plot.add_trace(
            go.Scatter(
                x=front["loss"], y=front["score"], mode="lines", line={"color": INK, "width": 1, "shape": "hv"},
                name="Pareto front", legendgroup="front", showlegend=place == 0, hoverinfo="skip",
            ),
            **panel,
        )  # fmt: skip
        for label, (color, symbol) in styles.items():
            own = group[group[kind].astype(str) == label]
            if own.empty:
                continue
            described = hover(own.rename(columns={"loss": "heldout_loss", "score": "aligned"}))
            more = [
                f"<br>on the front in {number(100 * row['membership'], '.0f')} % of draws"
                + (f"<br><b>cell of the {row['role']} side of the pair</b>" if row["role"] else "")
                for row in own.to_dict("records")
            ]
            plot.add_trace(
                go.Scatter(
                    x=own["loss"],
                    y=own["score"],
                    mode="markers",
                    marker={
                        "symbol": symbol,
                        "color": color,
                        "size": 7 + 7 * own["membership"],
                        "opacity": 0.85,
                        "line": {"color": INK, "width": np.where(own["role"] == "", 0, 2.5)},
                    },
                    name=text(label),
                    legendgroup=label,
                    showlegend=label not in shown,
                    hoverinfo="text",
                    hovertext=[run + rest for run, rest in zip(described, more, strict=True)],
                    customdata=own["run_id"],
                ),
                **panel,
            )
            shown.add(label)
    return Figure(
        title="Where a better minimum would be: up and to the left",
        reading="Each point is a run; the line joins those that no run beats in both loss and alignment. The larger a "
        "point, the more often it stays there when questions and responses are drawn anew. Ringed is the pair that was "
        "tested, or else the one with the largest gap.",
        caveat="The front of many noisy runs is made of lucky ones; the luck of seeds is not in the points' size.",
        plot=plot,
        table="runs",
    )


def _intervals(
    labels: list[str], value: pd.Series, low: pd.Series, high: pd.Series, described: list[str], *, x: str, color: str
) -> go.Figure:
    """Values with intervals, one below the other."""
    plot = blank(x, "", height=130 + 30 * len(labels))
    plot.add_trace(
        go.Scatter(
            x=value,
            y=list(range(len(labels))),
            mode="markers",
            marker={"color": color, "size": 9},
            error_x={
                "type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low,
                "thickness": 2, "width": 0,
            },
            hoverinfo="text",
            hovertext=described,
            showlegend=False,
        )
    )  # fmt: skip
    plot.update_yaxes(tickvals=list(range(len(labels))), ticktext=labels, autorange="reversed")
    plot.add_vline(0, line={"color": INK, "width": 1})
    return plot


def verdict_figure(result: Result) -> Figure:
    """The tested pair and the bound of all pairs against the margin."""
    rows = pd.DataFrame(result["verdicts"]).astype(
        {"effect": float, "low": float, "high": float, "largest_gain": float}
    )
    groups = [f"{title} – {outcome}".strip(" –") for title, outcome in zip(_titles(rows), rows["outcome"], strict=True)]
    described = [
        f"<b>{text(row['outcome'])}</b><br>{text(row['better'])}<br>against {text(row['worse'])}<br>"
        f"{number(row['effect'], '+.1f')} points ({number(row['low'], '+.1f')} to {number(row['high'], '+.1f')}), "
        f"p {number(row['p'], '.2g')}<br>no pair gains more than {number(row['largest_gain'], '.1f')}"
        for row in rows.to_dict("records")
    ]
    x = "better – worse, points of alignment"
    plot = _intervals(
        [text(g) for g in groups], rows["effect"], rows["low"], rows["high"], described, x=x, color=COLORS[0]
    )
    plot.add_trace(
        go.Scatter(
            x=rows["largest_gain"], y=list(range(len(rows))), mode="markers", hoverinfo="skip",
            marker={"symbol": "line-ns", "size": 16, "line": {"color": COLORS[1], "width": 3}},
            name="upper bound of any pair's gain",
        )
    )  # fmt: skip
    margin = result["verdict"]["margin"]
    plot.add_vline(margin, line={"color": COLORS[1], "width": 1, "dash": "dash"})
    return Figure(
        title="The verdict in points",
        reading="The bar is the tested pair's effect with its 90% interval, away from 0 when found; the stroke bounds "
        f"the gain of every pair and lies below the dashed margin ({margin:g} points) when not found.",
        caveat="The pair was chosen on other seeds and questions than these, or its interval corrected for the choice; "
        "where nothing is drawn there was no honest test to make.",
        plot=plot,
        table="verdicts",
    )


def matched_figure(rows: pd.DataFrame) -> Figure:
    """The largest differences at equal loss: rows of ``matched_pairs``."""
    drawn = rows.sort_values("difference", ascending=False).head(20)
    labels = [
        text(f"{row['better']} – {row['worse']}") if len(row["better"] + row["worse"]) < 60 else f"pair {place + 1}"
        for place, row in enumerate(drawn.to_dict("records"))
    ]
    described = [
        f"<b>{text(row['better'])}</b><br>against {text(row['worse'])}<br>{number(row['difference'], '+.1f')} points "
        f"({number(row['low'], '+.1f')} to {number(row['high'], '+.1f')}), loss differs by "
        f"{number(row['loss_difference'], '+.4f')}<br>of which loss explains {number(row['explained_by_loss'], '+.1f')}"
        for row in drawn.to_dict("records")
    ]
    x = "difference at equal loss, points of alignment"
    plot = _intervals(labels, drawn["difference"], drawn["low"], drawn["high"], described, x=x, color=COLORS[2])
    plot.add_trace(
        go.Scatter(
            x=drawn["explained_by_loss"], y=list(range(len(drawn))), mode="markers", hoverinfo="skip",
            marker={"symbol": "line-ns", "size": 12, "line": {"color": INK, "width": 2}},
            name="what the difference in loss explains",
        )
    )  # fmt: skip
    return Figure(
        title="Configurations of equal loss",
        reading="Each bar is a pair of configurations with the same loss: how much better aligned one is, with the 95% "
        "interval of the bootstrap over seeds, questions and responses.",
        caveat=f"The {len(drawn)} largest of {len(rows)} listed pairs: chosen for being large, they look better than "
        "they are; with one seed a cell, luck is not in the bars.",
        plot=plot,
        table="matched_pairs",
    )


def residual_figure(rows: pd.DataFrame) -> Figure:
    """Schedules against the loss-only curve: rows of ``residual_table``."""
    titles = _titles(rows)
    labels = [
        text(f"{row['schedule']} {title}".strip()) for row, title in zip(rows.to_dict("records"), titles, strict=True)
    ]
    described = [
        f"<b>{text(row['schedule'])}</b> against {text(row['curve'])}<br>{number(row['residual'], '+.1f')} points "
        f"({number(row['low'], '+.1f')} to {number(row['high'], '+.1f')}), p {number(row['p'], '.2g')}, "
        f"q {number(row['q'], '.2g')}<br>{row['cells']} cells"
        for row in rows.to_dict("records")
    ]
    x = "above the curve of the others, points of alignment"
    plot = _intervals(labels, rows["residual"], rows["low"], rows["high"], described, x=x, color=COLORS[3])
    return Figure(
        title="Schedules against what loss alone predicts",
        reading="How far a schedule's configurations lie above a monotone curve over loss through the others, with 95% "
        "intervals.",
        caveat="Only configurations within the curve's range of loss count; each counts once, whatever its seeds.",
        plot=plot,
        table="residuals",
    )


def max_test_figure(rows: pd.DataFrame) -> Figure:
    """The largest differences beside those of permuted labels: rows of ``max_test_table``."""
    titles = _titles(rows)
    labels = [
        text(f"{row['labels']} beyond {BEYOND[row['units']]} {title}".strip())
        for row, title in zip(rows.to_dict("records"), titles, strict=True)
    ]
    described = [
        f"largest difference between {text(row['labels'])}: {number(row['largest_difference'], '.1f')} points<br>"
        f"by chance: mean {number(row['null_mean'], '.1f')}, 95 % below {number(row['null_95'], '.1f')}<br>"
        f"p {number(row['p'], '.2g')}, {row['n_units']} {text(row['units'])}"
        for row in rows.to_dict("records")
    ]
    zero = pd.Series(0.0, index=rows.index)
    x = "largest difference, points of alignment"
    plot = _intervals(labels, rows["null_mean"], zero, rows["null_95"], described, x=x, color=INK)
    plot.add_trace(
        go.Scatter(
            x=rows["largest_difference"], y=list(range(len(rows))), mode="markers", name="observed",
            marker={"color": COLORS[0], "size": 11, "symbol": "diamond"}, hoverinfo="text", hovertext=described,
        )
    )  # fmt: skip
    return Figure(
        title="The maximum, tested as a maximum",
        reading="The diamond is the largest difference at equal loss; chance (permuted labels, or a null sweep) stays "
        "below the end of the bar in 95% of cases, the dot is its mean.",
        caveat="Permuting takes the scatter within a bin of loss as equal; where seeds are luckier in some cells than "
        "in others, small p-values come a little too often.",
        plot=plot,
        table="max_tests",
    )


def trajectory_figure(rows: pd.DataFrame) -> Figure:
    """Alignment at common levels of loss: rows of ``trajectory_tables``."""
    titles = _titles(rows)
    rows = rows.assign(line=[f"{cell} {title}".strip() for cell, title in zip(rows["cell"], titles, strict=True)])
    last = rows.sort_values("loss").groupby("line")["aligned"].first().sort_values()
    kept = [*last.index[:6], *[line for line in last.index[-6:] if line not in last.index[:6]]]
    plot = blank("held-out loss on the way (lower to the right)", "aligned, 0–100")
    for line, (color, symbol) in looks(kept).items():
        own = rows[rows["line"] == line].sort_values("loss")
        plot.add_trace(
            go.Scatter(
                x=own["loss"],
                y=own["aligned"],
                error_y={"type": "data", "array": own["error"], "thickness": 1, "width": 0},
                mode="lines+markers",
                line={"color": color, "width": 1.5},
                marker={"symbol": symbol, "size": 7},
                name=text(line),
                hoverinfo="text",
                hovertext=[
                    f"<b>{text(line)}</b><br>at loss {number(row['loss'], '.4f')}: {number(row['aligned'], '.1f')} "
                    f"± {number(row['error'], '.1f')} ({row['runs']} runs)"
                    for row in own.to_dict("records")
                ],
            )
        )
    plot.update_xaxes(type="log", autorange="reversed", nticks=6)
    return Figure(
        title="Alignment at equal loss, on the way",
        reading="Where lines differ at one loss, runs had learnt as much at a different cost in alignment; bars are "
        "standard errors over seeds.",
        caveat=f"{len(kept)} of {len(last)} configurations are drawn, the best and the worst at the end; between "
        "checkpoints alignment is interpolated.",
        plot=plot,
        table="trajectories",
    )
