"""Are two runs in different minima at all? What lies between their adapters, and how differently they answer."""

import numpy as np
import pandas as pd

from emanalysis.analysis import Analysis, Figure, Result
from emanalysis.geometry_figures import (
    LINES_DRAWN,
    barriers_figure,
    cosines_figure,
    disagreement_figure,
    lines_figure,
    sharpness_figure,
)
from emanalysis.geometry_tables import (
    BARRIER,
    GROUP,
    MARGIN,
    NONE,
    barriers_table,
    clusters_tables,
    disagreement_table,
    pairs_table,
    relations_table,
    sharpness_correlations,
    sharpness_table,
)
from emanalysis.plot import number
from emanalysis.records import Records
from emanalysis.run_pairs import OTHERS, SCHEDULES, SEEDS, without_adapters

TOLERANCE = 0.01
"""Share by which a loss measured at the end of a line may differ from the one that the run recorded."""
IN_WORDS = {SEEDS: "the same settings and another seed", SCHEDULES: "another schedule", OTHERS: "other settings"}


def compute(records: Records, *, seed: int) -> Result:
    """Barriers, angles, clusters and sharpness of what was measured; disagreement of answers of all runs."""
    command = f"emsweep geometry {records.sweep}"
    disagreements = disagreement_table(records, seed=seed)
    pairs = pairs_table(records)
    if pairs.empty and disagreements.empty:
        return {"reason": f"needs two comparable runs with scores, or what `{command}` measures between adapters"}
    result: Result = {
        "disagreement": disagreements.to_dict("records"),
        "on_disagreement": _on_disagreement(disagreements),
        "notes": [],
    }
    if pairs.empty:
        lacking = without_adapters(records.runs)
        why = f"nothing was measured between them; `{command}` does that"
        if len(lacking) == len(records.runs):
            reasons = ", or ".join(lacking["reason"].unique())
            why = f"no run has an adapter to measure: {reasons}"
        result["answer"] = f"Whether the runs are in different minima is not known: {why}."
        return result
    lines, points = barriers_table(records, pairs, seed=seed)
    by_relation = relations_table(lines) if len(lines) else pd.DataFrame()
    balls = sharpness_table(records)
    correlations = sharpness_correlations(balls) if len(balls) else pd.DataFrame()
    clusters, members = clusters_tables(records, pairs)
    return result | {
        "pairs": pairs.to_dict("records"),
        "barriers": lines.to_dict("records"),
        "lines": points.to_dict("records"),
        "relations": by_relation.to_dict("records"),
        "sharpness": balls.to_dict("records"),
        "sharpness_correlations": correlations.to_dict("records"),
        "clusters": clusters.to_dict("records"),
        "clustered_runs": members.to_dict("records"),
        "margin": MARGIN,
        "answer": _on_lines(lines, by_relation),
        "on_directions": " ".join(part for part in (_on_clusters(clusters), _on_spaces(pairs)) if part),
        "on_sharpness": _on_sharpness(correlations),
        "notes": _notes(lines),
    }


def _on_lines(lines: pd.DataFrame, by_relation: pd.DataFrame) -> str:
    if lines.empty:
        return "No line between two runs was measured."
    apart, joined, total = (lines["finding"] == BARRIER).sum(), (lines["finding"] == NONE).sum(), len(lines)
    verdict = "Mostly yes" if apart > total / 2 else "Mostly no" if joined > total / 2 else "No clear answer"
    parts = [
        f"{verdict}: on the straight line between two runs, {apart} of {total} pairs meet a loss barrier of more than "
        f"{MARGIN:.0%} of what training took off the loss, and {joined} meet none of that size."
    ]
    for row in by_relation.to_dict("records"):
        percent, low, high = (100 * row[column] for column in ("share", "share_low", "share_high"))
        shown = (
            f"With {IN_WORDS[row['relation']]} (n = {row['pairs']}) the barrier is {number(percent, '.1f')} % of it on "
            f"average{_interval(low, high)}"
        )
        if row["aligned_middle"] == row["aligned_middle"]:
            points = (row["aligned_middle"], row["aligned_middle_low"], row["aligned_middle_high"])
            shown += (
                f"; halfway, alignment is {number(-points[0], '+.1f')} points off the mean of the ends"
                f"{_interval(-points[2], -points[1])}"
            )
        parts.append(shown + ".")
    return " ".join(parts)


def _interval(low: float, high: float, form: str = ".1f") -> str:
    if not np.isfinite([low, high]).all():
        return ""
    return f" (95% interval {number(low, form)} to {number(high, form)})"


def _on_clusters(clusters: pd.DataFrame) -> str:
    if clusters.empty:
        return ""
    grouped = clusters[clusters["clusters"] > 1]
    if grouped.empty:
        return "By direction, the updates fall into no groups."
    largest = grouped.sort_values("runs").iloc[-1]
    like = [
        f"{what} {number(largest[column], '.2f')}"
        for what, column in (("seeds", "by_seed"), ("settings", "by_settings"))
        if np.isfinite(largest[column])
    ]
    agreement = f" (agreement, 0 chance to 1 the same: with {', with '.join(like)})" if like else ""
    return (
        f"By direction, the updates of the {largest['runs']} runs of {largest['model']} on {largest['dataset']} fall "
        f"into {largest['clusters']} groups{agreement}."
    )


def _on_spaces(pairs: pd.DataFrame) -> str:
    """On runs with different seeds, which share no starting point."""
    own = pairs[~pairs["same_seed"].astype(bool)].dropna(subset=["column_overlap", "row_overlap"])
    if own.empty:
        return ""
    columns = ["column_overlap", "column_by_chance", "row_overlap", "row_by_chance"]
    outputs, outputs_chance, inputs, inputs_chance = (number(value, ".2f") for value in own[columns].mean())
    return (
        f"Of the spaces that updates of runs with different seeds write to, {outputs} is shared ({outputs_chance} by "
        f"chance), of those that they read from {inputs} ({inputs_chance} by chance); n = {len(own)} pairs."
    )


def _on_disagreement(disagreements: pd.DataFrame) -> str:
    if disagreements.empty:
        return ""
    first = disagreements[[*GROUP, "question_set", "judge"]].iloc[0]
    own = disagreements[(disagreements[first.index] == first).all(axis=1)]
    shown = [
        f"{number(row['points'], '.1f')} points with {IN_WORDS[row['relation']]} "
        f"({number(row['low'], '.1f')} to {number(row['high'], '.1f')}, n = {row['pairs']} pairs)"
        for row in own.to_dict("records")
    ]
    return (
        f"Beyond the luck of samples, two runs' scores on a question of {first['question_set']} are apart by "
        f"{', '.join(shown)}."
    )


def _on_sharpness(correlations: pd.DataFrame) -> str:
    if correlations.empty:
        return ""
    shown = [
        f"{number(row['rho'], '.2f')}{_interval(row['low'], row['high'], '.2f')} for the {row['runs']} runs of "
        f"{row['model']} on {row['dataset']}"
        for row in correlations.to_dict("records")
        if row["sharpness"] == "uphill" and row["against"] == "aligned"
    ]
    return f"The rank correlation of the two is {', '.join(shown)}." if shown else ""


def _notes(lines: pd.DataFrame) -> list[str]:
    if lines.empty:
        return []
    notes = []
    measured = lines[["measured_loss_a", "measured_loss_b"]].to_numpy(float)
    off = int((np.abs(measured / lines[["loss_a", "loss_b"]].to_numpy(float) - 1) > TOLERANCE).sum())
    if off:
        notes.append(
            f"At {off} of {measured.size} ends the held-out loss differs from the recorded one by more than "
            f"{TOLERANCE:.0%}: other hardware or precision, or not the same base model."
        )
    if len(lines) > LINES_DRAWN:
        notes.append(f"{LINES_DRAWN} of {len(lines)} lines are drawn, evenly over their barriers.")
    return notes


def figures(result: Result) -> list[Figure]:
    """Lines, barriers by relation, cosines between updates, sharpness, and disagreement."""
    drawn = []
    if result.get("barriers"):
        drawn.append(lines_figure(pd.DataFrame(result["lines"]), pd.DataFrame(result["barriers"])))
        drawn.append(barriers_figure(pd.DataFrame(result["barriers"])))
    if result.get("clustered_runs"):
        drawn.append(
            cosines_figure(
                pd.DataFrame(result["clustered_runs"]), pd.DataFrame(result["pairs"]), result["on_directions"]
            )
        )
    if result.get("sharpness"):
        drawn.append(sharpness_figure(pd.DataFrame(result["sharpness"]), result["on_sharpness"]))
    if result["disagreement"]:
        drawn.append(disagreement_figure(pd.DataFrame(result["disagreement"]), result["on_disagreement"]))
    return drawn


minima_geometry = Analysis(
    title="Geometry of the minima",
    question="Are the runs in different minima at all?",
    compute=compute,
    figures=figures,
    order=40,
)
