"""The search for a lower-loss, better-aligned minimum, and its verdict."""

import zlib
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd

from emanalysis.analysis import Analysis, Figure, Result
from emanalysis.comparable import GROUP, LOSS_NAMES, LOSSES, SCORES, Comparable, comparable, left_out, scored_runs
from emanalysis.confirmation import confirmable
from emanalysis.gap_figures import (
    matched_figure,
    max_test_figure,
    plane_figure,
    residual_figure,
    trajectory_figure,
    verdict_figure,
)
from emanalysis.gap_tables import (
    Rows,
    matched_pairs,
    max_diffs,
    max_test_table,
    null_row,
    pair_table,
    pareto_table,
    replication,
    residual_table,
    trajectory_tables,
)
from emanalysis.max_diff import max_diff
from emanalysis.null_sweep import MIN_RUNS, NullReference, null_reference
from emanalysis.plot import number
from emanalysis.power import ALPHA, FIELD, MOST_QUESTIONS, MOST_SEEDS, assumed, designs_for
from emanalysis.records import Records
from emanalysis.verdict import MARGIN, Outcome, Verdict, decide

CALIPER = 0.005
"""Losses of a matched pair differ by at most half a percent."""
ANSWERED = 3
"""Groups that the answer speaks of one by one."""

TABLES = (
    "verdicts",
    "what_would_settle",
    "replication",
    "pairs",
    "matched_pairs",
    "residuals",
    "max_tests",
    "runs",
    "trajectories",
    "trajectory_tests",
)


def compute(
    records: Records, *, seed: int, null: Records | None = None, margin: float = MARGIN, caliper: float = CALIPER
) -> Result:
    """Every way of looking for a better minimum, and the verdict.

    ``null`` is a null sweep: one cell with at least five seeds, of the same model and dataset, asked and judged alike,
    for sweeps whose cells have one seed; None takes the sweep's own cell with most seeds, where it has that many. Of
    several cells it is the one with most seeds; those that a search proposed or picked are never taken.
    ``margin`` is the gain, in points, that would matter. ``caliper`` is the largest difference of log losses that
    counts as equal loss.

    Raises ``ValueError`` when ``null`` has no such cell for any part of the sweep.
    """
    loss = "heldout_loss" if records.runs["heldout_loss"].notna().any() else "heldout_loss_per_sequence"
    every_group = comparable(records, loss=loss)
    groups = [group for group in every_group if group.matrix.cells > 1]
    gaps = max_diffs(scored_runs(records), SCORES, LOSSES, GROUP)
    if not groups:
        return {"reason": _nothing_to_compare(every_group, left_out(records, loss=loss)), "max_diff": gaps}

    null_groups = null_cells(null, groups, loss=loss) if null is not None else []
    tables: dict[str, Rows] = {name: [] for name in TABLES}
    verdicts = []
    notes = [
        f"Loss is the {LOSS_NAMES[loss]}; runs of one configuration (a cell) differ in the seed alone.",
        f"The margin, the gain that would matter, is {margin:g} points.",
        *(
            f"The null sweep is {null.sweep}: {other.matrix.runs_per_cell[cell]} seeds of {_where(other, cell)}."
            for other in null_groups
            if null is not None and (cell := plain_cell(other)) is not None
        ),
    ]
    for group in groups:
        # One stream per group, so that a group's numbers do not depend on which others there are.
        rng = np.random.default_rng([seed, zlib.crc32(repr(group.key).encode())])
        # A stream of its own, so that a null sweep the verdict has no use for does not change it.
        luck, on_luck = _luck(group, null_groups, rng.spawn(1)[0])
        verdict = decide(group.matrix, rng=rng, null=luck, margin=margin, alpha=ALPHA / len(groups))
        verdicts.append(verdict)
        notes += group.notes + on_luck
        others = [other for other in groups if other is not group and _run_kind(other) == _run_kind(group)]
        notes += _add(tables, group, others, verdict, caliper=caliper, margin=margin, rng=rng)
        if luck is not None:
            _extend(tables, group, max_tests=[null_row(luck)])
        try:
            paths, tests = trajectory_tables(group, records.checkpoints)
            _extend(tables, group, trajectories=paths, trajectory_tests=tests)
        except ValueError as error:
            notes.append(f"Checkpoints at equal loss on {group.question_set}: {error}.")
    outcome = _overall(verdicts)
    return {
        "verdict": {"outcome": outcome, "margin": margin, "caliper": caliper, "alpha": ALPHA, "groups": len(groups)}
        | {"null_sweep": null.sweep if null is not None else None},
        "answer": _answer(
            outcome, groups, verdicts, tables["what_would_settle"], judges=records.questions["judge"].nunique()
        ),
        "max_diff": gaps,
        **tables,
        "notes": list(dict.fromkeys(notes)),
    }


def null_cells(null: Records, groups: list[Comparable], *, loss: str) -> list[Comparable]:
    """The groups of a null sweep that can be held against ``groups``. Raises ``ValueError`` where there is none."""
    found = comparable(replace(null, judge=groups[0].judge), loss=loss)
    fitting = [other for other in found if any(other.key == group.key for group in groups)]
    if not fitting:
        theirs, ours = ({key: {group.key[key] for group in side} for key in groups[0].key} for side in (found, groups))
        differing = [key for key in ours if not theirs[key] & ours[key]] or [*ours]
        told = [f"{key.replace('_', ' ')} {_listed(theirs[key])}, not {_listed(ours[key])}" for key in differing]
        raise ValueError(
            f"the null sweep {null.sweep} has {'; '.join(told) if found else 'no finished and scored runs'}. It takes "
            "one of the same model and dataset, asked and judged alike"
        )
    if all(plain_cell(other) is None for other in fitting):
        most = max(int(other.matrix.runs_per_cell.max()) for other in fitting)
        if most >= MIN_RUNS:
            raise ValueError(
                f"the null sweep {null.sweep} has a search, whose configurations were picked for how their runs came "
                f"out, and no other configuration with at least {MIN_RUNS} finished seeds. Train one with that many"
            )
        raise ValueError(
            f"the null sweep {null.sweep} has {most} finished seeds of a configuration; at least {MIN_RUNS} are needed"
        )
    return fitting


def plain_cell(group: Comparable) -> int | None:
    """The cell with most seeds of those that no search proposed or picked; None where none has ``MIN_RUNS``."""
    seeds = group.matrix.runs_per_cell
    if "role" in group.runs:
        seeds = seeds.copy()
        seeds[group.matrix.cell[group.runs["role"].isin(["search", "confirm"])]] = 0
    return int(seeds.argmax()) if seeds.max() >= MIN_RUNS else None


def _listed(values: set[str]) -> str:
    return " and ".join(sorted(values))


def _where(group: Comparable, cell: int) -> str:
    asked = f"{group.model} on {group.dataset}, asked {group.question_set}, judged by {group.judge}"
    if group.matrix.cells == 1:
        return f"one configuration of {asked}"
    return f"{group.cells['cell'][cell]}, one of {group.matrix.cells} configurations of {asked}"


def _nothing_to_compare(groups: list[Comparable], lost: list[str]) -> str:
    needed = "needs finished, scored runs of at least two configurations of one model and dataset"
    if not groups or len(groups[0].runs) < 2:
        return ". ".join([needed, *(note.rstrip(".") for note in lost)])
    runs = groups[0]
    gap = max_diff(runs.matrix.loss, runs.matrix.run_score).value
    made = (
        f"luck alone makes a run {number(gap, '.1f')} points better aligned than another of no less loss"
        if gap >= 0
        else f"luck makes no run better aligned than another of no less loss: the best is {-gap:.1f} points worse"
    )
    return f"{needed}; this one has {len(runs.runs)} seeds of one configuration (a null sweep), among which {made}"


def _add(
    tables: dict[str, Rows],
    group: Comparable,
    others: list[Comparable],
    verdict: Verdict,
    *,
    caliper: float,
    margin: float,
    rng: np.random.Generator,
) -> list[str]:
    """Extend the tables by those of one group; returns sentences on what they leave out."""
    pairs, count, small_q = pair_table(group, margin)
    residuals, notes = residual_table(group, rng=rng)
    better, worse = _pair(group, verdict)
    cell = group.matrix.cell
    _extend(
        tables,
        group,
        verdicts=[_verdict_row(group, verdict) | {"pairs_with_q_below_05": small_q}],
        what_would_settle=_settling(verdict),
        replication=replication(group, better, worse, others),
        pairs=pairs,
        matched_pairs=matched_pairs(group, caliper, rng=rng),
        residuals=residuals,
        max_tests=max_test_table(group, rng=rng),
        runs=pareto_table(group, np.select([cell == better, cell == worse], ["better", "worse"], ""), rng=rng),
    )
    if count > len(pairs):
        notes.append(
            f"Of {count} pairs on {group.question_set} the {len(pairs)} with the smallest p-values are listed."
        )
    return notes


def _run_kind(group: Comparable) -> tuple[str, str]:
    return group.model, group.dataset


def _extend(tables: dict[str, Rows], group: Comparable, **rows: Rows) -> None:
    for name, own in rows.items():
        tables[name] += [group.key | row for row in own]


def _luck(
    group: Comparable, null_groups: list[Comparable], rng: np.random.Generator
) -> tuple[NullReference | None, list[str]]:
    """What luck makes of the group's cells, by the null sweep on the same questions; else by the group's own cell with
    most seeds, where its others have too few. None where there is neither; and notes: why one that is there was not
    used, or which cell of its own the group is judged by."""
    known = [other for other in null_groups if other.key == group.key]
    if confirmable(group.matrix).sum() < 2:
        known.append(group)
    for other in known:
        cell = plain_cell(other)
        if cell is None:
            continue
        null = other.matrix.take(runs=other.matrix.cell == cell)
        try:
            reference = null_reference(group.matrix, null, rng=rng)
        except ValueError as error:
            return None, [f"The null sweep was not used on {group.question_set}: {error}."]
        own = f"Luck is that of {len(null.loss)} seeds of the sweep's own {_where(group, cell)}."
        return reference, [own] if other is group else []
    return None, []


def _pair(group: Comparable, verdict: Verdict) -> tuple[int, int]:
    """The cells that were tested; where none were, those with the largest gap."""
    if verdict.better is not None and verdict.worse is not None:
        return verdict.better, verdict.worse
    gap = max_diff(group.cells["loss"], group.cells["score"])
    return gap.better, gap.worse


def _verdict_row(group: Comparable, verdict: Verdict) -> dict[str, Any]:
    row = asdict(verdict)
    low, high = row.pop("interval")
    noise = {f"noise_{name}": value for name, value in row.pop("noise").items()}
    search_seeds = row.pop("design")["search_seeds"]
    names = group.cells["cell"]
    tested = {side: None if row[side] is None else names[row[side]] for side in ("better", "worse")}
    size = {"runs": len(group.runs), "questions": len(group.strata), "question_groups": group.matrix.clusters}
    size |= {"search_seeds": search_seeds}
    return row | tested | {"low": low, "high": high} | size | noise


def _settling(verdict: Verdict) -> Rows:
    """Designs that would detect the margin, where the verdict is open; unknown noise is the field's."""
    if verdict.outcome != "can't tell":
        return []
    noise, unknown = assumed(verdict.noise)
    return [
        {"by": way, "seeds": design.seeds, "questions": design.questions}
        | {"samples": design.samples, "detects": detects, "assumed": ", ".join(unknown)}
        for way, (design, detects) in designs_for(noise, verdict.design, verdict.margin, alpha=verdict.alpha).items()
    ]


def _overall(verdicts: list[Verdict]) -> Outcome:
    outcomes = {verdict.outcome for verdict in verdicts}
    if "found" in outcomes:
        return "found"
    return "not found" if outcomes == {"not found"} else "can't tell"


def _answer(outcome: Outcome, groups: list[Comparable], verdicts: list[Verdict], settling: Rows, *, judges: int) -> str:
    """The verdict in a few sentences, a paragraph for each group that decided it. Of several judges, by which one."""
    deciding = [pair for pair in zip(groups, verdicts, strict=True) if pair[1].outcome == outcome]
    paragraphs = [f"{outcome.capitalize()}."]
    for group, verdict in deciding[:ANSWERED]:
        by = f", judged by {group.judge}" if judges > 1 else ""
        sentences = [f"On {group.question_set} ({group.model}, {group.dataset}{by}): {verdict.reason}"]
        sentences.append(_pair_sentence(group, verdict))
        if outcome != "found" and np.isfinite(verdict.detectable):
            sentences.append(f"A gain of {number(verdict.detectable, '.0f')} points would likely have been found.")
        if outcome == "can't tell":
            own = [row for row in settling if all(row[name] == value for name, value in group.key.items())]
            sentences.append(_settling_sentence(verdict, own))
        paragraphs.append(" ".join(sentences))
    if len(deciding) > ANSWERED:
        paragraphs.append(f"{len(deciding) - ANSWERED} more groups have the same verdict.")
    return "\n".join(paragraphs)


def _pair_sentence(group: Comparable, verdict: Verdict) -> str:
    better, worse = _pair(group, verdict)
    names, score = group.cells["cell"], group.cells["score"]
    if verdict.better is None:
        gap = score[better] - score[worse]
        if gap < 0:
            return (
                f"No configuration is better aligned than another of no less loss: the best of {verdict.pairs} pairs "
                f"is {-gap:.1f} points worse."
            )
        return f"The largest gap at no more loss is {gap:.1f} points, the maximum of {verdict.pairs} pairs."
    low, high = (number(bound, "+.1f") for bound in verdict.interval)
    return (
        f"The pair tested, one of {verdict.pairs} pairs of {verdict.cells} configurations: {names[better]} is "
        f"{abs(verdict.effect):.1f} points {'worse' if verdict.effect < 0 else 'better'} aligned than {names[worse]} "
        f"(90% interval of the gain {low} to {high}; "
        f"p {number(verdict.p, '.2g')}, needed {number(verdict.alpha, '.2g')}), and its loss differs by "
        f"{number(verdict.loss_difference, '+.4f')}."
    )


def _settling_sentence(verdict: Verdict, ways: Rows) -> str:
    seen = verdict.design.search_seeds
    known = "" if seen is None else f" ({seen} of them the search's)"
    sizes = [
        f"{row['seeds']} seeds of each configuration{known} and {row['questions']} questions"
        + (f", each answered {number(row['samples'], '.0f')} times" if row["by"] == "samples" else "")
        for row in ways
    ]
    guess = ""
    if not np.isfinite(verdict.noise.seed):
        guess = f", were the luck of seeds {FIELD.seed:g} points (the published runs' upper bound)"
    if sizes:
        return f"To find {verdict.margin:g} points{guess}: {'; or '.join(dict.fromkeys(sizes))}."
    return (
        f"Even {MOST_SEEDS} seeds of each and {MOST_QUESTIONS} times the questions would not find {verdict.margin:g} "
        f"points among {verdict.cells} configurations{guess}: compare fewer, or take a larger margin."
    )


def figures(result: Result) -> list[Figure]:
    """The plane of loss and alignment with the pair, the effect against the margin, and each way of looking."""
    drawn = [plane_figure(pd.DataFrame(result["runs"]))]
    if any(row["better"] is not None for row in result["verdicts"]):
        drawn.append(verdict_figure(result))
    if result["matched_pairs"]:
        drawn.append(matched_figure(pd.DataFrame(result["matched_pairs"])))
    if result["residuals"]:
        drawn.append(residual_figure(pd.DataFrame(result["residuals"])))
    if result["max_tests"]:
        drawn.append(max_test_figure(pd.DataFrame(result["max_tests"])))
    if result["trajectories"]:
        drawn.append(trajectory_figure(pd.DataFrame(result["trajectories"])))
    return drawn


better_minima = Analysis(
    title="Is there a better minimum?",
    question="Does some configuration reach the same or a lower loss and stay better aligned, by more than luck?",
    compute=compute,
    figures=figures,
    order=0,
)
