"""Figures of the minima's geometry, drawn from its tables."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from emanalysis.analysis import Figure
from emanalysis.geometry_tables import GROUP, MARGIN, PAIR
from emanalysis.plot import COLORS, INK, blank, evenly, hover, looks, number, text
from emanalysis.run_pairs import RELATIONS

LINES_DRAWN = 60
"""Lines that one plot takes; of more, these are spread evenly over their barriers."""
RELATION_COLORS = dict(zip(RELATIONS, COLORS, strict=False))


def lines_figure(points: pd.DataFrame, lines: pd.DataFrame) -> Figure:
    """Excess of loss and lack of alignment on the lines: rows of ``barriers_table``, both parts."""
    plot = blank("place on the line between two runs", "", rows=2, height=600, shared_xaxes=True, vertical_spacing=0.07)
    plot.update_yaxes(title_text="held-out loss, above", row=1)
    plot.update_yaxes(title_text="aligned, below", autorange="reversed", row=2)
    points = points.merge(_spread(lines)[PAIR], on=PAIR)
    shown: set[str] = set()
    for _, line in points.groupby(PAIR, sort=False):
        pair = line.iloc[0]
        relation = str(pair["relation"])
        for row, column in ((1, "loss_excess"), (2, "aligned_below")):
            if column not in line:
                continue
            own = line.dropna(subset=[column]).sort_values("t")
            described = [
                f"<b>{text(pair['name_a'])}</b> to <b>{text(pair['name_b'])}</b><br>at {number(point['t'], '.2f')}: "
                f"held-out loss {number(point['heldout_loss'], '.4f')}, aligned {number(point.get('aligned'), '.1f')}"
                for point in own.to_dict("records")
            ]
            plot.add_trace(
                go.Scatter(
                    x=own["t"],
                    y=own[column],
                    mode="lines+markers",
                    line={"color": RELATION_COLORS[relation], "width": 1.4},
                    marker={"size": 4},
                    opacity=0.8,
                    name=relation,
                    legendgroup=relation,
                    showlegend=relation not in shown,
                    hoverinfo="text",
                    hovertext=described,
                    customdata=own["run_a"],
                ),
                row=row,
                col=1,
            )
            shown.add(relation)
    for row in (1, 2):
        plot.add_hline(0, line={"color": INK, "width": 1}, row=row, col=1)
    return Figure(
        title="On the straight line between two runs",
        reading="Each line goes from one run (0) to another (1) through the space of weights; drawn is how much higher "
        "the held-out loss, and how much lower the alignment, is than the straight line between the two ends.",
        caveat="A straight line that climbs shows a barrier on that line only: a curved path may go around it.",
        plot=plot,
        table="lines",
    )


def _spread(lines: pd.DataFrame) -> pd.DataFrame:
    """At most ``LINES_DRAWN`` of the lines, evenly over their barriers."""
    return lines.iloc[evenly(np.argsort(lines["loss_barrier"].to_numpy(), kind="stable").tolist(), LINES_DRAWN)]


def barriers_figure(lines: pd.DataFrame) -> Figure:
    """Barriers with their intervals, by relation."""
    lines = _spread(lines).sort_values(["relation", "share"])
    plot = blank("loss barrier, as a share of what training took off the loss", "", height=170 + 22 * len(lines))
    labels = [f"{number + 1}" for number in range(len(lines))]
    lines = lines.assign(label=labels)
    for relation, own in lines.groupby("relation"):
        described = [
            f"<b>{text(row['name_a'])}</b> to <b>{text(row['name_b'])}</b><br>"
            f"barrier {number(row['loss_barrier'])} nats "
            f"({number(row['loss_barrier_low'])} to {number(row['loss_barrier_high'])})<br>"
            f"cosine of the updates {number(row['cosine'], '.2f')}; {text(row['finding'])}"
            for row in own.to_dict("records")
        ]
        plot.add_trace(
            go.Scatter(
                x=own["share"],
                y=own["label"],
                mode="markers",
                marker={"color": RELATION_COLORS[str(relation)], "size": 8},
                error_x={
                    "array": own["share_high"] - own["share"],
                    "arrayminus": (own["share"] - own["share_low"]).clip(lower=0),
                    "thickness": 1,
                    "width": 0,
                },
                name=str(relation),
                hoverinfo="text",
                hovertext=described,
                customdata=own["run_a"],
            )
        )
    plot.add_vline(MARGIN, line={"color": INK, "width": 1, "dash": "dot"})
    plot.update_xaxes(tickformat=".0%", rangemode="tozero")
    plot.update_yaxes(title_text="pair", showticklabels=False, categoryorder="array", categoryarray=labels)
    return Figure(
        title="How high the barriers are",
        reading=f"Each point is a pair of runs with a 95% interval; right of the dotted line ({MARGIN:.0%}) the two "
        "are in different minima as far as straight lines tell.",
        caveat="Intervals draw the held-out rows anew; as the largest of several points a barrier leans to the right.",
        plot=plot,
        table="barriers",
    )


def cosines_figure(members: pd.DataFrame, pairs: pd.DataFrame, finding: str) -> Figure:
    """Cosines between updates, ordered by ``clusters_tables``."""
    groups = sorted(members.groupby(GROUP), key=lambda group: -len(group[1]))[:4]
    rows = len(groups)
    plot = blank(
        "",
        "",
        rows=rows,
        titles=[" · ".join(map(str, key)) for key, _ in groups] if rows > 1 else [],
        height=90 + 360 * rows,
        vertical_spacing=0.12 / rows,
    )
    known = {(pair["run_a"], pair["run_b"]): pair["cosine"] for pair in pairs.to_dict("records")}
    for place, (_, runs) in enumerate(groups):
        runs = runs.sort_values("place")
        ids, labels = runs["run_id"].tolist(), [text(name) for name in runs["name"]]
        square = [[1.0 if a == b else known.get((a, b), known.get((b, a))) for b in ids] for a in ids]
        plot.add_trace(
            go.Heatmap(
                z=square,
                zmin=-1,
                zmax=1,
                colorscale=[[0, COLORS[1]], [0.5, "rgba(128, 135, 146, 0.12)"], [1, COLORS[0]]],
                showscale=place == 0,
                colorbar={"title": {"text": "cosine", "side": "right"}, "thickness": 12, "outlinewidth": 0},
                hoverinfo="text",
                text=[
                    [
                        f"<b>{one}</b><br><b>{other}</b><br>cosine {number(value, '.3f')}"
                        for other, value in zip(labels, row, strict=True)
                    ]
                    for one, row in zip(labels, square, strict=True)
                ],
            ),
            row=place + 1,
            col=1,
        )
        clustered = [f"{cluster + 1}" for cluster in runs["cluster"]]
        plot.update_yaxes(tickvals=list(range(len(ids))), ticktext=labels, autorange="reversed", row=place + 1, col=1)
        plot.update_xaxes(tickvals=list(range(len(ids))), ticktext=clustered, row=place + 1, col=1)
    plot.update_xaxes(title_text="group", row=rows, col=1)
    return Figure(
        title="Directions of the updates",
        reading="The cosine between the weight updates of any two runs, like beside like; below, the group that each "
        f"run falls into. {finding}",
        caveat="Runs with one seed start from the same A matrices, and an update lies in the rows of its A: runs with "
        "different seeds have small cosines even where they have learnt the same.",
        plot=plot,
        table="clustered_runs",
    )


def sharpness_figure(balls: pd.DataFrame, finding: str) -> Figure:
    """Rise of the loss uphill against alignment: rows of ``sharpness_table``."""
    radius = balls["uphill_radius"].iloc[0]
    plot = blank("rise in held-out loss uphill", "aligned, 0–100")
    for schedule, (color, symbol) in looks(balls["schedule"]).items():
        own = balls[balls["schedule"].astype(str) == schedule]
        described = [
            run + f"<br>uphill {number(row['uphill'])}, random {number(row['random'])} nats"
            for run, row in zip(hover(own), own.to_dict("records"), strict=True)
        ]
        plot.add_trace(
            go.Scatter(
                x=own["uphill"],
                y=own["aligned"],
                mode="markers",
                marker={"symbol": symbol, "size": 9, "color": color, "opacity": 0.85},
                name=text(schedule),
                hoverinfo="text",
                hovertext=described,
                customdata=own["run_id"],
            )
        )
    return Figure(
        title="Sharpness against alignment",
        reading="Each point is a run: further right, its held-out loss rises more within a step of "
        f"{radius:.0%} of its update's length, in the worst direction that ascent found. {finding}",
        caveat="Ascent finds a lower bound of the worst, and a step is measured against the run's own update, so "
        "longer updates are moved further.",
        plot=plot,
        table="sharpness",
    )


def disagreement_figure(table: pd.DataFrame, finding: str) -> Figure:
    """Disagreement by relation: rows of ``disagreement_table``."""
    keys = [key for key in (*GROUP, "question_set", "judge") if table[key].nunique() > 1]
    table = table.assign(label=table[[*keys, "relation"]].astype(str).agg(" · ".join, axis=1))
    plot = blank("difference per question, in points", "", height=150 + 26 * len(table))
    for relation, color in RELATION_COLORS.items():
        own = table[table["relation"] == relation]
        plot.add_trace(
            go.Scatter(
                x=own["points"],
                y=[text(label) for label in own["label"]],
                mode="markers",
                marker={"color": color, "size": 9},
                error_x={
                    "array": own["high"] - own["points"],
                    "arrayminus": own["points"] - own["low"],
                    "thickness": 1,
                    "width": 0,
                },
                name=relation,
                hoverinfo="text",
                hovertext=[
                    f"{text(row['label'])}: {number(row['points'], '.1f')} points "
                    f"({number(row['low'], '.1f')} to {number(row['high'], '.1f')}), {row['pairs']} pairs"
                    for row in own.to_dict("records")
                ],
            )
        )
    plot.update_xaxes(rangemode="tozero")
    order = [text(label) for label in table["label"]]
    plot.update_yaxes(categoryorder="array", categoryarray=order[::-1])
    return Figure(
        title="How differently runs answer the same questions",
        reading="Root mean square difference between two runs' scores on a question, the luck of the samples taken "
        f"off: where schedules or settings matter beyond the seed, their points lie right of the seeds'. {finding}",
        caveat="Intervals draw the questions anew and keep the runs; where a question was sampled once, the luck of "
        "the sample could not be taken off.",
        plot=plot,
        table="disagreement",
    )
