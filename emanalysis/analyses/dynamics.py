"""What happens during training: realised learning rates, losses, and alignment from checkpoint to checkpoint."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from emanalysis.adapter_paths import adapter_paths
from emanalysis.analysis import Analysis, Figure, Result
from emanalysis.early_stopping import ONSET_DROP, by_optimizer, earlier_checkpoints, onsets, stopped_at
from emanalysis.plot import BASE_LINE, CLEAR, INK, blank, evenly, hover, looks, number, panels, text
from emanalysis.records import Records

STRETCHES = 100
"""Training steps are drawn as means over at most this many equal stretches of a run."""
RUNS_DRAWN = 48
"""Runs whose training steps are drawn; of more, these are spread evenly over the held-out losses."""
PANELS = 6
KEPT = (0.8, 0.9, 0.95)
"""Shares of the fall in held-out loss that early stopping is to keep."""
QUOTED = 0.9

SETTINGS = ["run_id", "name", "model", "dataset", "schedule", "optimizer", "learning_rate", "seed"]


def compute(records: Records, *, seed: int) -> Result:
    """Traces of training of all runs; of finished runs trajectories, onset of misalignment, and early stopping.

    Nothing here is random; ``seed`` is not used.
    """
    steps = records.steps
    logged = records.runs[records.runs["run_id"].isin(steps["run_id"].unique())]
    chosen = evenly(logged.sort_values(["heldout_loss", "run_id"])["run_id"].tolist(), RUNS_DRAWN)
    traces = stretches(steps[steps["run_id"].isin(chosen)]).merge(records.runs[SETTINGS], on="run_id")
    trajectories = _trajectories(records)
    if traces.empty and trajectories.empty:
        return {"reason": "needs logged training steps, or runs scored at two steps or more; this sweep has neither"}

    notes = []
    if len(chosen) < len(logged):
        notes.append(f"Training steps of {len(chosen)} of {len(logged)} runs are drawn, evenly over held-out loss.")
    result: Result = {
        "traces": traces.to_dict("records"),
        "trajectories": trajectories.to_dict("records"),
        "notes": notes,
    }
    if trajectories.empty:
        notes.append(
            "Trajectories, the onset of misalignment and early stopping need finished runs scored at two steps or more "
            "(eval.at in the recipe); this sweep has none."
        )
        return result

    began = onsets(trajectories)
    adapters = adapter_paths(records, trajectories, began)
    optimizers = by_optimizer(trajectories, began)
    earlier = earlier_checkpoints(trajectories)
    stops = [stopped_at(earlier, share) for share in KEPT]
    names = records.runs[["run_id", "name"]]
    return result | {
        "onsets": began.merge(names, on="run_id").to_dict("records"),
        "earlier_checkpoints": earlier.to_dict("records"),
        "early_stopping": stops,
        "adapters": adapters.to_dict("records"),
        "optimizers": optimizers.to_dict("records"),
        "answer": _answer(began, stops[KEPT.index(QUOTED)])
        + _on_adapters(adapters, began)
        + _on_optimizers(optimizers),
    }


def stretches(steps: pd.DataFrame) -> pd.DataFrame:
    """Steps of each run averaged over stretches: ``run_id, step, train_loss, realised_learning_rate``."""
    width = np.ceil(steps.groupby("run_id")["step"].transform("max") / STRETCHES)
    stretch = ((steps["step"] - 1) // width).rename("stretch")
    means = steps.groupby(["run_id", stretch], sort=False)[["step", "train_loss", "learning_rate"]].mean()
    return means.reset_index().drop(columns="stretch").rename(columns={"learning_rate": "realised_learning_rate"})


def _trajectories(records: Records) -> pd.DataFrame:
    """Alignment (mean over question sets) and held-out loss by step, of finished runs scored at two steps or more."""
    finished = records.runs.loc[records.runs["status"] == "FINISHED", SETTINGS]
    scored = records.checkpoints[records.checkpoints["stratum"].isna() & records.checkpoints["aligned"].notna()]
    values = ["heldout_loss", "aligned", "coherent", "misaligned_rate"]
    points = scored.groupby(["run_id", "step", "fraction"], as_index=False)[values].mean()
    points = points[points.groupby("run_id")["step"].transform("count") >= 2]
    return points.merge(finished, on="run_id")


def _on_adapters(adapters: pd.DataFrame, began: pd.DataFrame) -> str:
    """A sentence on the size of the update at the onset, and of those that never fell; empty where it is not known."""
    if adapters.empty:
        return ""
    fallen = adapters.loc[adapters["onset"], "adapter_norm"]
    never = began.loc[began["onset_by"].isna(), "run_id"]
    spared = adapters[adapters["run_id"].isin(never)].groupby("run_id")["adapter_norm"].last()
    if fallen.empty:
        return ""
    sentence = (
        f" Where misalignment was first seen, the adapter's update had a norm of {number(fallen.median())} (median of "
        f"{len(fallen)}; {number(fallen.min())} to {number(fallen.max())})"
    )
    if len(spared):
        sentence += f"; the {len(spared)} that did not fall ended at {number(spared.median())}"
    return sentence + "."


def _on_optimizers(optimizers: pd.DataFrame) -> str:
    """A sentence on the model and dataset with most runs under several optimisers; empty where there is none."""
    several = [group for _, group in optimizers.groupby(["model", "dataset"]) if len(group) > 1]
    if not several:
        return ""
    largest = max(several, key=lambda group: group["runs"].sum())
    shown = [
        f"{row['fell']} of {row['runs']} with {row['optimizer']} (at the end: held-out loss "
        f"{number(row['heldout_loss'], '.3f')} in the median, aligned {number(row['aligned'], '.1f')} on average)"
        for row in largest.to_dict("records")
    ]
    where = largest.iloc[0]
    return f" Of {where['model']} on {where['dataset']} fell {', '.join(shown)}."


def _answer(began: pd.DataFrame, stop: dict[str, Any]) -> str:
    if began.empty:
        return "Runs were scored at several steps, but not at step 0, so there is no base model to compare them with."
    fallen = began.dropna(subset=["onset_by"])
    answer = f"{len(fallen)} of {len(began)} runs fell {ONSET_DROP:.0f} points or more below the base model"
    if len(fallen):
        settled = int((fallen["onset_by"] <= fallen["plateau_by"]).sum())
        answer += f", {settled} of them by the time their held-out loss had settled"
    answer += "."
    if stop["aligned_gain"] is not None:
        bounds = f"{number(stop['low'], '+.1f')} to {number(stop['high'], '+.1f')}"
        interval = f" (95% interval {bounds})" if stop["low"] is not None else ""
        answer += (
            f" Stopping at the first checkpoint with {stop['loss_kept_at_least']:.0%} of the fall in loss would have "
            f"changed alignment by {number(stop['aligned_gain'], '+.1f')} points{interval}, in the {stop['runs']} of "
            f"{stop['of_runs']} runs with such a checkpoint before their last."
        )
    return answer


def figures(result: Result) -> list[Figure]:
    """Traces, trajectories over steps and against loss, and what earlier checkpoints had kept."""
    drawn = []
    if result["traces"]:
        drawn.append(_traces_figure(pd.DataFrame(result["traces"])))
    if result["trajectories"]:
        trajectories = pd.DataFrame(result["trajectories"])
        drawn.append(
            Figure(
                title="Alignment over checkpoints",
                reading="Each line is a run from the base model (dotted level) to its last checkpoint (filled).",
                caveat="Every point has the noise of its responses: small ups and downs on the way mean nothing.",
                plot=_lines(_with_last(trajectories), "fraction", "share of the run's steps"),
                table="trajectories",
            )
        )
        paths = _lines(_with_last(trajectories), "heldout_loss", "held-out loss (lower to the right)")
        paths.update_xaxes(autorange="reversed")
        drawn.append(
            Figure(
                title="Paths through the plane of loss and alignment",
                reading="Runs go to the right as they learn the task; where paths part, one loss was had at different "
                "alignment.",
                caveat="Runs with different learning rates pass a loss after different numbers of steps, and paths of "
                "different seeds differ by chance.",
                plot=paths,
                table="trajectories",
            )
        )
    if result.get("adapters"):
        drawn.append(_adapters_figure(pd.DataFrame(result["adapters"])))
    if result.get("earlier_checkpoints"):
        drawn.append(_earlier_figure(pd.DataFrame(result["earlier_checkpoints"])))
    return drawn


def _joined(runs: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The runs' points below each other with an empty row between runs, so that one line draws them all."""
    gap = pd.DataFrame({column: [np.nan] for column in columns})
    parts = [part for _, points in runs.groupby("run_id", sort=False) for part in (points[columns].astype(object), gap)]
    return pd.concat(parts[:-1], ignore_index=True)


def _traces_figure(traces: pd.DataFrame) -> Figure:
    plot = blank("step", "", rows=2, height=560, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.4, 0.6])
    plot.update_yaxes(title_text="learning rate", row=1)
    plot.update_yaxes(title_text="training loss", row=2)
    traces = traces.assign(text=hover(traces))
    for schedule, (color, _) in looks(traces["schedule"]).items():
        runs = traces[traces["schedule"].astype(str) == schedule]
        points = _joined(runs, ["run_id", "step", "train_loss", "realised_learning_rate", "text"])
        for row, column in ((1, "realised_learning_rate"), (2, "train_loss")):
            line = go.Scatter(
                x=points["step"],
                y=points[column],
                mode="lines",
                line={"color": color, "width": 1.2},
                opacity=0.8,
                name=text(schedule),
                legendgroup=schedule,
                showlegend=row == 1,
                hoverinfo="text",
                hovertext=points["text"] if row == 2 else None,
                customdata=points["run_id"],
            )
            plot.add_trace(line, row=row, col=1)
    low, high = traces["train_loss"].quantile([0.0, 0.98])
    margin = 0.05 * (high - low)
    plot.update_yaxes(range=[low - margin, high + margin], row=2)
    return Figure(
        title="Learning rate and training loss",
        reading="Each line is a run; the upper panel is the learning rate it was really trained with.",
        caveat="Training loss is of the batch at hand and differs between steps by what the batch holds; the highest "
        "values, at the start, are cut off.",
        plot=plot,
        table="traces",
    )


def _with_last(trajectories: pd.DataFrame) -> pd.DataFrame:
    return trajectories.assign(marked=trajectories["step"] == trajectories.groupby("run_id")["step"].transform("max"))


def _lines(
    trajectories: pd.DataFrame, x: str, title: str, *, y: str = "aligned", y_title: str = "aligned, 0–100"
) -> go.Figure:
    """A line per run through its checkpoints, the ``marked`` ones filled, and a panel per model and dataset.

    With alignment the base model's level is drawn, too.
    """
    groups = panels(trajectories)[:PANELS]
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    plot = blank(
        title,
        y_title,
        rows=rows,
        columns=columns,
        titles=[name for name, _ in groups] if len(groups) > 1 else [],
        height=150 + 280 * rows,
        shared_yaxes="all",
        horizontal_spacing=0.05,
        vertical_spacing=0.3 / rows,
    )
    styles = looks(trajectories["schedule"])
    shown: set[str] = set()
    for place, (_, group) in enumerate(groups):
        panel = {"row": place // columns + 1, "col": place % columns + 1}
        group = group.sort_values(["run_id", "step"])
        steps = [f"<br>step {number(step, '.0f')}" for step in group["step"]]
        more = group["more"] if "more" in group else [""] * len(group)
        described = [run + step + rest for run, step, rest in zip(hover(group), steps, more, strict=True)]
        group = group.assign(text=described)
        for schedule, (color, symbol) in styles.items():
            runs = group[group["schedule"].astype(str) == schedule]
            if runs.empty:
                continue
            points = _joined(runs, ["run_id", x, y, "marked", "text"])
            ends = points["marked"].eq(True)
            line = go.Scatter(
                x=points[x],
                y=points[y],
                mode="lines+markers",
                line={"color": color, "width": 1.2},
                marker={
                    "symbol": symbol,
                    "size": np.where(ends, 9, 5),
                    "color": np.where(ends, color, CLEAR),
                    "line": {"color": color, "width": 1.2},
                },
                opacity=0.8,
                name=text(schedule),
                legendgroup=schedule,
                showlegend=schedule not in shown,
                hoverinfo="text",
                hovertext=points["text"],
                customdata=points["run_id"],
            )
            plot.add_trace(line, **panel)
            shown.add(schedule)
        base = group.loc[group["step"] == 0, "aligned"]
        if len(base) and y == "aligned":
            plot.add_hline(base.iloc[0], line=BASE_LINE, **panel)
    return plot


def _adapters_figure(adapters: pd.DataFrame) -> Figure:
    adapters = adapters.rename(columns={"onset": "marked"})
    described = [
        f"<br>norm {number(row['adapter_norm'])}, stable rank {number(row['adapter_stable_rank'])}, turned by "
        f"{number(row['adapter_turn'], '.0f')}° since the point before"
        for row in adapters.to_dict("records")
    ]
    norms = _lines(
        adapters.assign(more=described),
        "fraction",
        "share of the run's steps",
        y="adapter_norm",
        y_title="norm of update",
    )
    return Figure(
        title="Size of the adapters' updates along the way",
        reading="Each line is a run; filled is the point at which its misalignment was first seen. If a size of the "
        "update were what tips runs over, the filled points would lie at one height.",
        caveat="The onset lies somewhere between the filled point and the one before; how much an update of one size "
        "does differs between layers.",
        plot=norms,
        table="adapters",
    )


def _earlier_figure(earlier: pd.DataFrame) -> Figure:
    plot = blank("share of the fall in held-out loss", "aligned, minus the last checkpoint's")
    for schedule, (color, symbol) in looks(earlier["schedule"]).items():
        points = earlier[earlier["schedule"].astype(str) == schedule]
        steps = [f"<br>step {number(step, '.0f')}" for step in points["step"]]
        plot.add_trace(
            go.Scatter(
                x=points["loss_kept"],
                y=points["aligned_gain"],
                mode="markers",
                marker={"symbol": symbol, "size": 9, "color": color, "opacity": 0.8},
                name=text(schedule),
                hoverinfo="text",
                hovertext=[run + step for run, step in zip(hover(points), steps, strict=True)],
                customdata=points["run_id"],
            )
        )
    plot.add_hline(0, line={"color": INK, "width": 1})
    plot.add_vline(1, line=BASE_LINE)
    plot.update_xaxes(tickformat=".0%")
    return Figure(
        title="What stopping earlier would have kept",
        reading="Each point is an earlier checkpoint: further right, it had learnt more; higher up, it was better "
        "aligned than the same run's last.",
        caveat="The best of many points is best partly by luck: choose where to stop by loss, then score that anew.",
        plot=plot,
        table="earlier_checkpoints",
    )


dynamics = Analysis(
    title="Training dynamics",
    question="How did runs get where they ended, and would stopping earlier have kept them aligned?",
    compute=compute,
    figures=figures,
    order=20,
)
