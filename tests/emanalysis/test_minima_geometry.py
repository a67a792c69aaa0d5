"""The analysis on measured tables with a known truth: seeds share a valley, schedules are apart."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from emanalysis.analyses.minima_geometry import minima_geometry
from emanalysis.analysis import Result
from emanalysis.geometry_tables import pairs_table
from emanalysis.records import Records
from emanalysis.report import plain
from emanalysis.run_pairs import OTHERS, SCHEDULES, SEEDS
from emtrain import names

T = np.linspace(0, 1, 11).round(6)
ROWS = 30
HEIGHT = {SEEDS: 0.01, SCHEDULES: 0.3, OTHERS: 0.05}
"""Barriers in nats. Training took about one nat off the loss: from 3 to about 2."""


def relation(a: pd.Series, b: pd.Series) -> str:
    if a["schedule"] == b["schedule"] and a["learning_rate"] == b["learning_rate"]:
        return SEEDS
    return SCHEDULES if a["learning_rate"] == b["learning_rate"] else OTHERS


def tables(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Every pair of runs, each line a parabola of its relation's height; alignment dips by 20 for other schedules."""
    rng = np.random.default_rng(0)
    losses, responses, updates, balls = [], [], [], []
    for i, a in runs.iterrows():
        for _, b in runs.loc[i + 1 :].iterrows():
            pair = {"run_a": a["run_id"], "step_a": 20, "run_b": b["run_id"], "step_b": 20}
            kind = relation(a, b)
            spread = rng.normal(0, 0.1, ROWS)
            for t in T:
                level = (1 - t) * a["heldout_loss"] + t * b["heldout_loss"] + HEIGHT[kind] * 4 * t * (1 - t)
                losses += [
                    pair | {"t": t, "row": row, "loss": 5 * (level + spread[row] - spread.mean()), "tokens": 5}
                    for row in range(ROWS)
                ]
            for t in (0.0, 0.5, 1.0):
                aligned = 60.0 - 20 * (kind == SCHEDULES) * (t == 0.5)
                responses += [
                    pair
                    | {
                        "t": t,
                        "question_set": "broad",
                        "question_id": f"q{q}",
                        "topic": f"topic{q}",
                        "judge": "micro-rule",
                    }
                    | {"sample": sample, "aligned": aligned + rng.normal(0, 1)}
                    for q in range(10)
                    for sample in range(3)
                ]
            cosine = 0.8 if a["seed"] == b["seed"] else 0.05
            updates.append(
                pair
                | {
                    "cosine": cosine + rng.normal(0, 0.01),
                    "row_overlap": 0.2,
                    "column_overlap": 0.3,
                    "column_by_chance": 0.1,
                }
            )
        for kind, rises in (("none", [0.0]), ("random", [0.1, 0.2, 0.3]), ("adversarial", [1.0 + i])):
            balls += [
                {"run_id": a["run_id"], "step": 20, "kind": kind, "radius": 0.5, "draw": draw, "heldout_loss": 2 + rise}
                for draw, rise in enumerate(rises)
            ]
    made = {"losses": losses, "responses": responses, "updates": updates, "sharpness": balls}
    return {
        table: pd.DataFrame(rows).reindex(columns=list(names.GEOMETRY_TABLES[table])) for table, rows in made.items()
    }


@pytest.fixture(scope="module")
def study(sweep_of: Callable[..., Records]) -> Records:
    """Two schedules x two rates x three seeds."""
    records = sweep_of(lambda run, question: 80 - 10 * (run["schedule"] == "linear"), rates=(1e-5, 1e-4))
    runs = records.runs.assign(aligned=np.linspace(90, 50, len(records.runs)))
    measured = tables(runs)
    return Records("study", runs, records.checkpoints, records.questions, load_geometry=lambda: measured)


@pytest.fixture(scope="module")
def result(study: Records) -> Result:
    return plain(minima_geometry.compute(study, seed=0))


def test_barriers_are_those_of_the_parabolas_and_told_by_their_share(result: Result) -> None:
    by_relation = {row["relation"]: row for row in result["relations"]}
    for kind, height in HEIGHT.items():
        assert by_relation[kind]["loss_barrier"] == pytest.approx(height, abs=1e-9)
    # Each schedule and rate has 3 pairs of seeds, each rate 9 of schedules.
    assert (by_relation[SEEDS]["pairs"], by_relation[SEEDS]["no barrier"]) == (12, 12)
    assert (by_relation[SCHEDULES]["pairs"], by_relation[SCHEDULES]["barrier"]) == (18, 18)
    row = result["barriers"][0]
    assert row["share"] == pytest.approx(row["loss_barrier"] / (3 - (row["loss_a"] + row["loss_b"]) / 2))
    assert row["loss_barrier_at"] == 0.5
    assert (row["measured_loss_a"], row["measured_loss_b"]) == pytest.approx((row["loss_a"], row["loss_b"]))


def test_falls_of_alignment_are_found_where_they_are(result: Result) -> None:
    by_relation = {row["relation"]: row for row in result["relations"]}
    assert by_relation[SCHEDULES]["aligned_middle"] == pytest.approx(20, abs=0.2)
    assert by_relation[SEEDS]["aligned_middle_low"] < 0 < by_relation[SEEDS]["aligned_middle_high"]


def test_clusters_follow_the_seeds_that_they_were_made_by(result: Result) -> None:
    (found,) = result["clusters"]
    assert (found["runs"], found["clusters"], found["by_seed"]) == (12, 3, 1.0)
    assert found["by_settings"] < 0.1
    assert [len({row["seed"] for row in result["clustered_runs"] if row["cluster"] == n}) for n in range(3)] == [
        1,
        1,
        1,
    ]


def test_sharpness_is_a_rise_above_the_run_itself(result: Result) -> None:
    assert result["sharpness"][0]["random"] == pytest.approx(0.2)
    assert sorted(row["uphill"] for row in result["sharpness"]) == pytest.approx(np.arange(12) + 1.0)
    uphill = [row for row in result["sharpness_correlations"] if row["sharpness"] == "uphill"]
    assert {row["against"]: row["rho"] for row in uphill}["aligned"] == -1


def test_answers_differ_by_schedule_and_not_by_seed(result: Result) -> None:
    """Scores are 70 or 80 by schedule, means of 10 responses with standard deviation 10, whose luck is 1 each."""
    found = {row["relation"]: row for row in result["disagreement"]}
    assert found[SEEDS]["points"] == 0
    assert found[SCHEDULES]["points"] == pytest.approx(np.sqrt(100 - 20), abs=0.01)
    assert (found[SEEDS]["pairs"], found[SCHEDULES]["pairs"]) == (12, 18)


def test_the_answer_is_a_sentence_with_the_numbers(result: Result) -> None:
    answer = result["answer"]
    assert answer.startswith("Mostly no: on the straight line between two runs, 18 of 66 pairs meet a loss barrier")
    assert re.search(r"With the same settings and another seed \(n = 12\) the barrier is [01]\.\d % of it", answer)
    assert re.search(r"halfway, alignment is −(19.9|20.0|20.1) points off the mean of the ends", answer)
    assert "fall into 3 groups" in result["on_directions"]
    # Of twelve runs with three seeds, 66 - 3 * 6 pairs have different ones.
    assert "write to, 0.30 is shared (0.10 by chance), of those that they read from 0.20" in result["on_directions"]
    assert "n = 48 pairs" in result["on_directions"]
    assert "is −1.00 for the 12 runs of micro-llama on garden-bad" in result["on_sharpness"]


def test_figures_are_drawn_of_the_numbers(result: Result) -> None:
    figures = minima_geometry.figures(result)
    assert [figure.table for figure in figures] == [
        *("lines", "barriers", "clustered_runs", "sharpness", "disagreement")
    ]
    for figure in figures:
        assert result[figure.table]


def test_ends_that_are_not_what_the_runs_recorded_are_told(study: Records) -> None:
    other = replace(study, runs=study.runs.assign(heldout_loss=2 * study.runs["heldout_loss"]))
    notes = minima_geometry.compute(other, seed=0)["notes"]
    assert any("At 132 of 132 ends the held-out loss differs from the recorded one by more than 1%" in n for n in notes)


def test_without_measurements_it_says_what_is_known_and_how_to_know_more(sweep_of: Callable[..., Records]) -> None:
    records = sweep_of(lambda run, question: 80 - 10 * (run["schedule"] == "linear"))
    result = plain(minima_geometry.compute(records, seed=0))
    assert result["answer"].startswith("Whether the runs are in different minima is not known")
    assert result["answer"].endswith("`emsweep geometry test` does that.")
    assert "are apart by 0.0 points with the same settings and another seed" in result["on_disagreement"]
    assert [figure.table for figure in minima_geometry.figures(result)] == ["disagreement"]


def test_runs_without_adapters_are_not_sent_to_be_measured(sweep_of: Callable[..., Records]) -> None:
    records = sweep_of(lambda run, question: 80.0)
    imported = replace(records, runs=records.runs.assign(imported_from="em-generalization"))
    answer = minima_geometry.compute(imported, seed=0)["answer"]
    assert answer == (
        "Whether the runs are in different minima is not known: no run has an adapter to measure: "
        "it was imported, without an adapter."
    )


def test_without_scores_and_measurements_there_is_a_reason(sweep_of: Callable[..., Records]) -> None:
    records = sweep_of(lambda run, question: 80.0)
    bare = Records("bare", records.runs, records.checkpoints, records.questions[:0])
    assert "emsweep geometry bare" in minima_geometry.compute(bare, seed=0)["reason"]


def test_a_run_that_is_gone_takes_its_pairs_with_it(study: Records) -> None:
    gone = study.runs["run_id"].iloc[0]
    pairs = pairs_table(replace(study, runs=study.runs.iloc[1:]))
    assert len(pairs) == 66 - 11
    assert gone not in {row[side] for row in pairs.to_dict("records") for side in ("run_a", "run_b")}
