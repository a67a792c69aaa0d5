import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from emanalysis.analyses.better_minima import better_minima, compute
from emanalysis.import_runs import import_runs
from emanalysis.records import Records, load
from emanalysis.report import plain
from emtrain.tracking import SweepLog

BETTER = "linear, lr 0.0001"


def scores(better_by: float, seed: int = 0, luck: float = 1.0) -> Callable[[dict[str, Any], str], float]:
    """Alignment falls with the loss; of the two schedules at the highest rate, linear is better."""
    rng = np.random.default_rng(seed)
    of_run: dict[str, float] = {}

    def score(run: dict[str, Any], question: str) -> float:
        mean = 60 + 40 * np.log(run["heldout_loss"] / 2)
        mean += better_by * (run["schedule"] == "linear" and run["learning_rate"] == 1e-4)
        return float(mean + of_run.setdefault(run["run_id"], rng.normal(0, luck)) + rng.normal(0, 2))

    return score


def only(result: dict[str, Any], table: str) -> dict[str, Any]:
    (row,) = result[table]
    return row


def test_a_planted_better_minimum_is_found_and_shown(sweep_of: Callable[..., Records]) -> None:
    result = plain(compute(sweep_of(scores(15), seeds=5), seed=0))
    row = only(result, "verdicts")
    assert result["verdict"]["outcome"] == row["outcome"] == "found"
    assert row["better"] == BETTER
    assert row["low"] < 15 < row["high"]
    assert (row["cells"], row["runs"], row["questions"], row["question_groups"]) == (6, 30, 10, 5)
    assert result["answer"].startswith("Found.\nOn broad (micro-llama, garden-bad):")
    assert BETTER in result["answer"]
    assert result["what_would_settle"] == []
    largest = max(result["max_diff"], key=lambda gap: gap["max_diff"])
    assert "linear 0.0001" in largest["better"]
    assert result["matched_pairs"][0]["better"] == BETTER
    assert result["pairs"][0]["better"] == BETTER
    tests = {row["labels"]: row for row in result["max_tests"]}
    assert tests["cells"]["p"] < 0.05
    assert {row["role"] for row in result["runs"]} == {"better", "worse", ""}


def test_nothing_planted_is_not_found_and_says_what_would_settle_it(sweep_of: Callable[..., Records]) -> None:
    result = plain(compute(sweep_of(scores(0, luck=4.0)), seed=0))
    assert result["verdict"]["outcome"] == "can't tell"
    ways = result["what_would_settle"]
    assert {row["by"] for row in ways} <= {"seeds", "questions", "samples", "fewest responses"}
    assert all(row["detects"] <= 5 for row in ways)
    assert f"To find 5 points: {ways[0]['seeds']} seeds" in result["answer"]


def test_quiet_sweeps_can_say_no(sweep_of: Callable[..., Records]) -> None:
    result = plain(compute(sweep_of(scores(0, luck=0.2), seeds=6), seed=0))
    row = only(result, "verdicts")
    assert row["outcome"] == "not found"
    assert row["largest_gain"] < 5
    assert result["answer"].startswith("Not found.")


@pytest.mark.parametrize("with_null", [True, False])
def test_single_seeds_need_a_null_sweep(sweep_of: Callable[..., Records], with_null: bool) -> None:
    single = sweep_of(scores(40), seeds=1, rates=(1e-5, 2e-5, 3e-5, 5e-5, 1e-4))
    null = sweep_of(scores(0, seed=1), seeds=10, rates=(3e-5,))
    null = replace(null, runs=null.runs[null.runs["schedule"] == "linear"])
    result = plain(compute(single, seed=0, null=null if with_null else None))
    assert result["verdict"]["outcome"] == ("found" if with_null else "can't tell")
    labels = {(row["labels"], row["units"]) for row in result["max_tests"]}
    assert (("cells", "null sweep") in labels) == with_null
    assert ("null sweep" in result["answer"]) or with_null


def test_the_null_sweep_and_the_margin_are_on_record(sweep_of: Callable[..., Records]) -> None:
    single = sweep_of(scores(40), seeds=1, rates=(1e-5, 2e-5, 3e-5, 5e-5, 1e-4))
    null = replace(sweep_of(scores(0, seed=1), seeds=10, rates=(3e-5,)), sweep="luck")
    result = compute(single, seed=0, null=null, margin=3.0)
    assert (result["verdict"]["null_sweep"], result["verdict"]["margin"]) == ("luck", 3.0)
    several = "The null sweep is luck: 10 seeds of cosine_restarts, cycles 4, one of 2 configurations of micro-llama on"
    assert several in " ".join(result["notes"])
    one = replace(null, runs=null.runs[null.runs["schedule"] == "linear"])
    notes = " ".join(compute(single, seed=0, null=one)["notes"])
    assert "The null sweep is luck: 10 seeds of one configuration of micro-llama on garden" in notes
    assert "the gain that would matter, is 3 points" in " ".join(result["notes"])


def test_a_null_sweep_does_not_change_a_verdict_that_needs_none(sweep_of: Callable[..., Records]) -> None:
    several, null = sweep_of(scores(5), seeds=4), sweep_of(scores(0, seed=1), seeds=8, rates=(3e-5,))
    alone, beside = (compute(several, seed=0, null=other) for other in (None, null))
    assert plain(alone["verdicts"]) == plain(beside["verdicts"])
    assert len(beside["max_tests"]) == len(alone["max_tests"]) + 1


def test_runs_of_one_schedule_are_coloured_by_what_else_differs(sweep_of: Callable[..., Records]) -> None:
    records = sweep_of(scores(5), rates=(1e-5, 3e-5))
    linear = replace(records, runs=records.runs[records.runs["schedule"] == "linear"])
    for swept, expected in ((records, {"linear", "cosine_restarts"}), (linear, {"lr 1e-05", "lr 3e-05"})):
        plane, *_ = better_minima.figures(plain(compute(swept, seed=0)))
        assert {trace.name for trace in plane.plot.data} - {"Pareto front"} == expected


@pytest.mark.parametrize(
    ("runs", "questions", "seeds", "said"),
    [
        ({"dataset": "garden-good"}, {}, 10, "luck has dataset garden-good, not garden-bad. It takes"),
        (
            {"model": "micro-qwen2"},
            {"judge": "other"},
            10,
            "model micro-qwen2, not micro-llama; judge other, not micro",
        ),
        ({}, {"question_set": "narrow"}, 10, "question set narrow, not broad"),
        ({"status": "FAILED"}, {}, 10, "luck has no finished and scored runs"),
        ({}, {}, 4, "luck has 4 finished seeds of a configuration; at least 5 are needed"),
    ],
)
def test_a_null_sweep_of_another_kind_is_refused_by_what_differs(
    sweep_of: Callable[..., Records], runs: dict[str, str], questions: dict[str, str], seeds: int, said: str
) -> None:
    other = sweep_of(scores(0), seeds=seeds, rates=(3e-5,))
    null = replace(other, sweep="luck", runs=other.runs.assign(**runs), questions=other.questions.assign(**questions))
    with pytest.raises(ValueError, match=said):
        compute(sweep_of(scores(0), seeds=1), seed=0, null=null)


def test_of_several_judges_the_verdict_says_by_which_it_is_and_the_null_sweep_is_read_by_it(
    sweep_of: Callable[..., Records],
) -> None:
    def twice(records: Records) -> Records:
        other = records.questions.assign(judge="other", first_judge=False)
        return replace(records, questions=pd.concat([records.questions.assign(first_judge=True), other]))

    single = twice(sweep_of(scores(40), seeds=1, rates=(1e-5, 2e-5, 3e-5, 5e-5, 1e-4)))
    null = twice(sweep_of(scores(0, seed=1), seeds=10, rates=(3e-5,)))
    for asked, judge in ((None, "micro-rule"), ("other", "other")):
        result = compute(replace(single, judge=asked), seed=0, null=null)
        assert only(result, "verdicts")["judge"] == judge
        assert f"On broad (micro-llama, garden-bad, judged by {judge}): " in result["answer"]
    assert "judged by" not in compute(sweep_of(scores(0)), seed=0)["answer"]


def test_luck_is_never_that_of_what_a_search_picked(sweep_of: Callable[..., Records]) -> None:
    """Of a searched sweep, cosine_restarts was confirmed on more seeds than linear, a cell of its grid, has."""
    single = sweep_of(scores(0), seeds=1)
    both = replace(sweep_of(scores(0, seed=1), seeds=8, rates=(3e-5,)), sweep="searched")
    winner = both.runs["schedule"] == "cosine_restarts"
    searched = both.runs.assign(role=np.where(winner, np.where(both.runs["seed"] < 2, "search", "confirm"), "grid"))
    kept = replace(both, runs=searched[winner | (searched["seed"] < 6)])
    notes = " ".join(compute(single, seed=0, null=kept)["notes"])
    assert "The null sweep is searched: 6 seeds of linear, one of 2" in notes
    few = replace(both, runs=searched[winner | (searched["seed"] < 4)])
    with pytest.raises(ValueError, match=r"searched has a search, .* no other configuration with at least 5 finished"):
        compute(single, seed=0, null=few)


def test_the_cell_of_its_own_that_a_sweep_is_judged_by_is_named(sweep_of: Callable[..., Records]) -> None:
    several = sweep_of(scores(0), seeds=6)
    one_each = (several.runs["run_id"].str.startswith("linear-1e-05")) | (several.runs["seed"] == 0)
    notes = " ".join(compute(replace(several, runs=several.runs[one_each]), seed=0)["notes"])
    assert "Luck is that of 6 seeds of the sweep's own linear, lr 1e-05, one of 6 configurations" in notes


def test_a_null_sweep_on_its_own_is_told_what_it_is(sweep_of: Callable[..., Records]) -> None:
    null = sweep_of(scores(0), seeds=8, rates=(3e-5,))
    result = compute(replace(null, runs=null.runs[null.runs["schedule"] == "linear"]), seed=0)
    assert "8 seeds of one configuration (a null sweep)" in result["reason"]
    assert result["max_diff"]


def test_a_gap_in_favour_of_more_loss_is_said_in_words_not_by_a_minus(sweep_of: Callable[..., Records]) -> None:
    """Two configurations, the one with less loss 20 points worse; of seeds, too, the less loss the worse."""
    steep = sweep_of(lambda run, question: 50 + 200 * (run["heldout_loss"] - 1.9), seeds=1, rates=(1e-5, 3e-5))
    linear = replace(steep, runs=steep.runs[steep.runs["schedule"] == "linear"])
    answer = compute(linear, seed=0)["answer"]
    assert "better aligned than another of no less loss: the best of 1 pairs is 20.0 points worse." in answer
    seeds = sweep_of(lambda run, question: 50 + 200 * (run["heldout_loss"] - 1.9), seeds=3, rates=(1e-5,))
    seeds = replace(seeds, runs=seeds.runs[seeds.runs["schedule"] == "linear"])
    reason = compute(seeds, seed=0)["reason"]
    assert "luck makes no run better aligned than another of no less loss: the best is 2.0 points worse" in reason
    several = sweep_of(lambda run, question: 50 + 200 * (run["heldout_loss"] - 1.9), rates=(1e-5, 3e-5))
    several = replace(several, runs=several.runs[several.runs["schedule"] == "linear"])
    answer = compute(several, seed=0)["answer"]
    assert "lr 3e-05 is 20.0 points worse aligned than lr 1e-05 (90% interval of the gain −2" in answer


def test_the_pair_is_looked_at_on_every_format_and_on_other_question_sets(sweep_of: Callable[..., Records]) -> None:
    one, other = sweep_of(scores(15), seeds=4), sweep_of(scores(15, seed=2), seeds=4)
    second = other.questions.assign(question_set="confirm")
    both = replace(one, questions=pd.concat([one.questions, second], ignore_index=True))
    result = compute(both, seed=0)
    rows = [row for row in result["replication"] if row["question_set"] == "broad"]
    assert [(row["asked"], row["stratum"], row["held_out"]) for row in rows] == [
        (asked, stratum, asked == "confirm")
        for asked in ("broad", "confirm")
        for stratum in ("all questions", "json", "plain")
    ]
    assert all(row["low"] < 15 < row["high"] for row in rows)
    assert [row["alpha"] for row in result["verdicts"]] == [0.025, 0.025]


def test_checkpoints_are_compared_at_equal_loss(sweep_of: Callable[..., Records]) -> None:
    result = compute(sweep_of(scores(15), seeds=4), seed=0)
    assert len(result["trajectories"]) == 5 * 6
    assert [row["runs"] for row in result["trajectories"]] == [4] * 30
    assert len(result["trajectory_tests"]) == 5


def test_pairs_are_adjusted_and_tested_for_equivalence(sweep_of: Callable[..., Records]) -> None:
    table = pd.DataFrame(compute(sweep_of(scores(0)), seed=0)["pairs"])
    assert (table["q"] >= table["p"]).all()
    assert table["p"].is_monotonic_increasing
    assert (table["loss_difference"] <= 0).all()
    assert table["p_equivalent"].between(0, 1).all()


def test_numbers_are_json_the_same_each_time_and_drawn(sweep_of: Callable[..., Records]) -> None:
    records = sweep_of(scores(5))
    result = plain(compute(records, seed=3))
    assert json.dumps(result, allow_nan=False) == json.dumps(plain(compute(records, seed=3)), allow_nan=False)
    drawn = better_minima.figures(result)
    shown = [figure.table for figure in drawn]
    assert shown == ["runs", "verdicts", "matched_pairs", "max_tests", "trajectories"]
    assert all(result[table] for table in shown)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seeds", [1, 3])
def test_scores_without_any_spread_are_no_find(sweep_of: Callable[..., Records], seeds: int) -> None:
    records = sweep_of(lambda run, question: 100.0, seeds=seeds)
    result = plain(compute(records, seed=0, null=sweep_of(lambda run, question: 100.0, seeds=6)))
    assert result["verdict"]["outcome"] != "found"
    assert all(row["p"] == 1 for row in result["max_tests"] + result["residuals"])
    assert better_minima.figures(result)


def test_published_means_alone_are_enough(sweep_of: Callable[..., Records]) -> None:
    records = sweep_of(scores(15), seeds=5)
    bare = records.questions.assign(aligned_sd=np.nan, n_judged=np.nan, coherent=np.nan, topic=None)
    result = plain(compute(replace(records, questions=bare), seed=0))
    row = only(result, "verdicts")
    assert (row["outcome"], row["better"], row["noise_response"]) == ("found", BETTER, None)


def test_one_configuration_only_gives_a_reason(sweep_of: Callable[..., Records]) -> None:
    records = sweep_of(scores(0), seeds=1, rates=(1e-4,))
    records = replace(records, runs=records.runs.head(1))
    assert compute(records, seed=0)["reason"].startswith("needs finished, scored runs of at least two configurations")


def test_runs_that_are_all_left_out_are_counted_with_why(sweep_of: Callable[..., Records]) -> None:
    records = sweep_of(scores(0))
    babble = replace(records, questions=records.questions.assign(coherent=20.0))
    assert compute(babble, seed=0)["reason"].endswith("Left out: 18 runs with mean coherence below 50")
    failed = replace(records, runs=records.runs.assign(status="FAILED"))
    assert compute(failed, seed=0)["reason"].endswith("Left out: 18 runs not finished")


@pytest.mark.slow
def test_published_runs_give_the_published_gaps_and_no_verdict(published_runs: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    import_runs("em-generalization", published_runs, log=SweepLog.open("fpq", uri=uri, artifacts=tmp_path))
    result = plain(compute(load("fpq", tracking_uri=uri), seed=0))
    gaps = pd.DataFrame(result["max_diff"]).set_index(["stratum", "score", "loss"])["max_diff"]["all questions"]
    assert gaps["aligned", "train_loss"] == pytest.approx(16.0558, abs=5e-5)
    assert gaps["aligned", "heldout_loss_per_sequence"] == pytest.approx(18.8233, abs=5e-5)
    assert gaps["harmless", "train_loss"] == pytest.approx(17.0417, abs=5e-5)
    assert gaps["harmless", "heldout_loss_per_sequence"] == pytest.approx(18.6250, abs=5e-5)
    by_format = {row["stratum"]: row["difference"] for row in result["replication"]}
    assert by_format == pytest.approx(
        {"all questions": 18.823, "plain": 4.635, "json": 37.145, "template": 14.69}, abs=1e-3
    )
    assert only(result, "verdicts")["outcome"] == "can't tell"
    assert len(result["runs"]) == 34
