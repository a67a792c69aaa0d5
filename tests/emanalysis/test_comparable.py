from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from emanalysis.comparable import WHOLE, cells, comparable, scored_runs, settings
from emanalysis.records import Records


@pytest.fixture
def records(sweep_of: Callable[..., Records]) -> Records:
    rng = np.random.default_rng(0)
    return sweep_of(lambda run, question: 40 + rng.normal(0, 3))


def test_a_cell_is_everything_but_the_seed_and_the_backend(records: Records) -> None:
    assert set(settings(records)) == {
        *("model", "dataset", "schedule", "schedule.cycles", "optimizer", "learning_rate"),
    }
    code, labels = cells(records.runs, settings(records))
    assert code.tolist() == np.repeat(np.arange(6), 3).tolist()
    assert labels[0] == "linear, lr 1e-05"
    assert labels[-1] == "cosine_restarts, cycles 4, lr 0.0001"


def test_interleaved_rows_make_a_cell_of_their_own_named_without_what_follows_from_them(records: Records) -> None:
    one = records.runs[(records.runs["schedule"] == "linear") & (records.runs["learning_rate"] == 1e-5)]
    runs = pd.concat([one.assign(total_steps=54, train_rows=215), one.assign(total_steps=108, train_rows=430)])
    other = {"interleave.dataset": [None] * 3 + ["good"] * 3, "interleave.fraction": [np.nan] * 3 + [0.5] * 3}
    runs = runs.assign(epochs=2.0, **other)
    code, labels = cells(runs, settings(replace(records, runs=runs)))
    assert code.tolist() == [0, 0, 0, 1, 1, 1]
    assert labels == ["plain", "interleaved with good, fraction 0.5"]
    published = replace(records, runs=runs.drop(columns="epochs"))
    assert "total_steps" in settings(published)


def test_runs_and_questions_become_a_matrix(records: Records) -> None:
    (group,) = comparable(records)
    assert group.key == {
        "model": "micro-llama",
        "dataset": "garden-bad",
        "question_set": "broad",
        "judge": "micro-rule",
    }
    assert group.matrix.scores.shape == (18, 10)
    assert (group.matrix.cells, group.matrix.clusters) == (6, 5)
    one = records.questions[(records.questions["run_id"] == "linear-3e-05-1")].set_index("question_id")["aligned"]
    place = group.runs.index[group.runs["run_id"] == "linear-3e-05-1"][0]
    assert group.matrix.scores[place].tolist() == one.sort_index().tolist()
    assert group.matrix.response_error == pytest.approx(10 / np.sqrt(10))
    assert group.cells["seeds"].tolist() == [3] * 6
    assert group.notes == []


def test_what_can_not_be_compared_is_left_out_and_counted(records: Records) -> None:
    runs, questions = records.runs.copy(), records.questions.copy()
    runs.loc[0, "status"] = "FAILED"
    runs.loc[1, "heldout_loss"] = np.inf
    runs.loc[2, "under_trained"] = True
    questions.loc[questions["run_id"] == runs.loc[3, "run_id"], "coherent"] = 30.0
    own = questions.index[questions["run_id"] == runs.loc[4, "run_id"]]
    questions.loc[own[:3], "aligned"] = np.nan
    other = questions.index[questions["run_id"] == runs.loc[5, "run_id"]]
    questions.loc[other[0], "aligned"] = np.nan
    (group,) = comparable(replace(records, runs=runs, questions=questions))
    assert len(group.runs) == 13
    assert group.matrix.scores.shape == (13, 9)
    assert group.notes == [
        "Left out: 1 run not finished.",
        "Left out: 1 run without a held-out loss.",
        "Left out: 1 run under-trained.",
        "Left out: 1 runs with mean coherence below 50.",
        "Left out: 1 runs without a score on more than 20% of the questions.",
        "Left out: 1 questions that have no score in some run.",
    ]


def test_runs_of_a_confirmation_are_those_that_no_search_went_by(records: Records) -> None:
    runs = records.runs.assign(role=np.where(records.runs["seed"] == 2, "confirm", "search"))
    (group,) = comparable(replace(records, runs=runs))
    assert group.matrix.cells == 6
    assert group.matrix.unsearched is not None
    assert group.matrix.unsearched.tolist() == (group.runs["seed"] == 2).tolist()
    for role in ("grid", "search", np.nan):
        (group,) = comparable(replace(records, runs=records.runs.assign(role=role)))
        assert group.matrix.unsearched is None


def test_the_judge_with_most_scores_is_taken(records: Records) -> None:
    second = records.questions.head(50).assign(judge="other", aligned=0.0)
    both = replace(records, questions=pd.concat([second, records.questions], ignore_index=True))
    (group,) = comparable(both)
    assert group.judge == "micro-rule"
    assert group.matrix.run_score.min() > 30
    assert "the scores are those of micro-rule" in group.notes[0]


def test_the_judge_that_the_recipe_names_first_is_taken_though_another_has_more_scores(records: Records) -> None:
    first = records.questions.assign(first_judge=True)
    gaps = first["question_id"].eq("money_json") & first["run_id"].eq("linear-1e-05-0")
    first.loc[gaps, "aligned"] = np.nan
    other = records.questions.assign(judge="other", aligned=0.0, first_judge=False)
    both = replace(records, questions=pd.concat([other, first], ignore_index=True))
    (group,) = comparable(both)
    assert group.judge == "micro-rule"
    assert "On broad the scores are those of micro-rule, the judge that the recipe names first." in group.notes
    (group,) = comparable(replace(both, judge="other"))
    assert group.judge == "other"
    assert "On broad the scores are those of other, the judge that was asked for." in group.notes
    silent = both.questions.assign(aligned=both.questions["aligned"].where(both.questions["judge"] == "other"))
    (group,) = comparable(replace(both, questions=silent))
    assert group.judge == "other"
    assert any("since micro-rule, the judge that the recipe names first, has given none" in n for n in group.notes)


def test_few_topics_leave_the_questions_on_their_own(records: Records) -> None:
    (group,) = comparable(replace(records, questions=records.questions.assign(topic="one")))
    assert group.matrix.clusters == 10
    assert "fewer than 5 topics" in group.notes[0]


def test_scored_runs_are_those_of_the_last_checkpoint(records: Records) -> None:
    table = scored_runs(records)
    assert set(table["stratum"]) == {WHOLE, "plain", "json"}
    assert len(table) == 18 * 3
    own = records.questions[records.questions["run_id"] == "linear-1e-05-0"]["aligned"].mean()
    row = table[(table["run_id"] == "linear-1e-05-0") & (table["stratum"] == WHOLE)]
    assert row["aligned"].tolist() == pytest.approx([own])
