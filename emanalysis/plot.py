"""The look shared by all plots: a blank plot, colours, what the pointer shows, and text that is only text."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

Item = TypeVar("Item")

COLORS = ("#0077bb", "#ee7733", "#009988", "#ee3377", "#33bbee", "#cc3311", "#8b7fd6")
"""Paul Tol's vibrant scheme, told apart with any colour vision; for its grey a violet, which dark pages show better."""
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "triangle-down")
INK = "#808792"
"""Text and lines: readable on black and on white, where no style sheet gives a better one."""
GRID = "rgba(128, 135, 146, 0.22)"
CLEAR = "rgba(0, 0, 0, 0)"
BASE_LINE = {"color": INK, "dash": "dot", "width": 1}
"""The model before fine-tuning, on every plot."""
FONT = "Inter, system-ui, -apple-system, Segoe UI, Roboto, sans-serif"


def text(value: object) -> str:
    """``value`` as text that a plot shows as it is: the characters of plotly's markup are escaped."""
    if value is None or value != value:
        return "–"
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def number(value: float | None, form: str = ".3g") -> str:
    """A number in the given format, with a true minus sign; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    written = format(value, form)
    return f"−{written[1:]}" if written.startswith("-") else written


def hover(runs: pd.DataFrame) -> list[str]:
    """What the pointer shows of runs: rows of ``Records.runs``, of which any column may be missing."""
    return [
        f"<b>{text(run.get('name'))}</b><br>"
        f"{text(run.get('schedule'))} · learning rate {number(run.get('learning_rate'))} · "
        f"seed {number(run.get('seed'), '.0f')}<br>"
        f"held-out loss {number(run.get('heldout_loss'), '.4g')} · aligned {number(run.get('aligned'), '.1f')}"
        for run in runs.to_dict("records")
    ]


def looks(names: Iterable[object]) -> dict[str, tuple[str, str]]:
    """A colour and a symbol for each name, in sorted order; no two of up to 49 names share both."""
    ordered = sorted({str(name) for name in names})
    return {
        name: (COLORS[i % len(COLORS)], SYMBOLS[(i + i // len(COLORS)) % len(SYMBOLS)])
        for i, name in enumerate(ordered)
    }


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """At most ``most`` of the items, first and last among them, evenly spaced."""
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in np.unique(places)]


def panels(table: pd.DataFrame, keys: Sequence[str] = ("model", "dataset")) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each combination of ``keys`` and a title for them, largest group first."""
    groups = table.groupby(list(keys), dropna=False)
    titled = [(" · ".join(map(str, name)), rows) for name, rows in groups]
    return sorted(titled, key=lambda group: (-len(group[1]), group[0]))


def blank(
    x: str, y: str, *, height: int = 440, rows: int = 1, columns: int = 1, titles: Sequence[str] = (), **grid: Any
) -> go.Figure:
    """An empty plot of ``rows`` by ``columns`` panels.

    ``x`` and ``y`` name the axes, ``titles`` the panels; ``grid`` is what else ``make_subplots`` takes.
    """
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=[text(title) for title in titles] or None, x_title=x, **grid
    )
    top = 34 if titles else 10
    figure.update_annotations(font={"size": 13, "color": INK})
    if x:
        # The title ends where the panels end: in the middle, beside wide labels, a narrow page would cut it off.
        figure.layout.annotations[-1].update(x=1, xanchor="right")
    figure.update_layout(
        template="none",
        height=height,
        font={"family": FONT, "size": 12.5, "color": INK},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        margin={"l": 60, "r": 14, "t": top, "b": 62},
        # Above the panels and their titles, so that neither long axis titles nor many entries run into each other.
        legend={"orientation": "h", "yanchor": "bottom", "y": 1 + top / (height - top - 62), "x": 0},
        hoverlabel={
            "align": "left",
            "bgcolor": "#20242c",
            "bordercolor": "#20242c",
            "font": {"color": "#fff", "size": 12},
        },
        hovermode="closest",
        dragmode=False,
    )
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": GRID,
        "tickcolor": GRID,
        "ticks": "outside",
        "automargin": True,
        "exponentformat": "power",
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis, title={"standoff": 8, "font": {"size": 13}})
    figure.update_yaxes(title_text=y, col=1)
    return figure
