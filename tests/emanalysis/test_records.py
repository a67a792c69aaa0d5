import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest

from emanalysis import metric_history, tidy
from emanalysis import records as records_module
from emanalysis.records import Records, load
from emtrain import names


def of(table: pd.DataFrame, run_id: str) -> pd.DataFrame:
    return table[table["run_id"] == run_id]


def test_every_run_is_there_with_its_status_and_reason_of_failure(records: Records, sweep: dict[str, str]) -> None:
    runs = records.runs.set_index("run_id")
    assert set(runs.index) == set(sweep.values())
    assert runs["status"].value_counts().to_dict() == {"FINISHED": 8, "FAILED": 1, "KILLED": 1}
    assert runs.loc[sweep["failed"], "failure"].startswith("loss is nan at step 2")
    assert runs["failure"].notna().sum() == 1


def test_params_have_their_mlflow_names_and_their_types(records: Records, sweep: dict[str, str]) -> None:
    run = of(records.runs, sweep["cosine 0.0003 seed 1"]).iloc[0]
    assert (run["model"], run["schedule"]) == ("micro-llama", "cosine")
    assert (run["learning_rate"], run["seed"], run["total_steps"]) == (3e-4, 1, 20)
    assert records.runs["seed"].dtype == "int64"


def test_runs_say_what_they_are_for_in_their_sweep(store: Any, new_run: Callable[..., str]) -> None:
    confirms = new_run("roles", name="confirms", learning_rate=1e-3, seed=10)
    new_run("roles", name="imported", learning_rate=1e-3, seed=0)
    mlflow.MlflowClient(store.uri).set_tag(confirms, names.ROLE, "confirm")
    runs = load("roles", tracking_uri=store.uri).runs.set_index("name")
    assert runs.loc["confirms", "role"] == "confirm"
    assert pd.isna(runs.loc["imported", "role"])


def test_a_param_that_is_none_is_missing_and_one_of_truth_values_is_boolean() -> None:
    assert tidy._typed(pd.Series(["1", "None", None], dtype="str")).isna().tolist() == [False, True, True]
    assert tidy._typed(pd.Series(["True", "False", "None"], dtype="str")).tolist() == [True, False, pd.NA]
    assert tidy._typed(pd.Series(["1e-3", "all"], dtype="str")).tolist() == ["1e-3", "all"]


def test_final_values_are_the_last_ones_logged(records: Records, sweep: dict[str, str]) -> None:
    run = of(records.runs, sweep["linear 0.001 seed 0"]).iloc[0]
    assert run["heldout_loss"] == pytest.approx(1.2 + 2 * np.exp(-4))  # 200 x 1e-3 x 20 steps
    assert run["train_loss"] == pytest.approx(1 + 2 * np.exp(-4))
    assert run["learning_rate_integral"] == pytest.approx(1e-3 * (20 - 19 / 2))  # a straight line from 1e-3 to 1e-3/20
    assert (run["n_judged"], run["n_missing"]) == (31, 1)  # 8 questions x 4 samples, one refused
    # 25,000 x 1e-3 points lower for plain questions and twice that for JSON ones: 90 - 37.5
    assert run["aligned"] == pytest.approx(52.5, abs=2)
    assert run["base_aligned"] == pytest.approx(90, abs=2)


def test_a_run_that_was_cut_off_has_checkpoints_but_no_final_scores(records: Records, sweep: dict[str, str]) -> None:
    killed = sweep["killed"]
    assert of(records.runs, killed)["aligned"].isna().all()
    scored = of(records.checkpoints, killed).dropna(subset=["aligned"])
    assert sorted(scored["step"].unique()) == [0, 5, 10]
    assert sorted(scored["fraction"].unique()) == [0, 0.25, 0.5]


def test_checkpoints_hold_the_whole_set_and_each_stratum(records: Records, sweep: dict[str, str]) -> None:
    rows = of(records.checkpoints, sweep["linear 0.001 seed 0"]).set_index(["step", "stratum"])
    assert set(rows.index) == {(0, np.nan)} | {(s, t) for s in (5, 10, 20) for t in ("json", "plain", np.nan)}
    assert rows["question_set"].eq("broad").all()
    assert rows.loc[(20, "json"), "aligned"] == pytest.approx(40, abs=3)
    assert rows.loc[(20, "plain"), "aligned"] == pytest.approx(65, abs=3)
    assert rows["heldout_loss"].groupby("step").nunique().eq(1).all()


def test_a_failed_run_without_scores_has_no_checkpoint(records: Records, sweep: dict[str, str]) -> None:
    assert of(records.checkpoints, sweep["failed"]).empty
    assert len(of(records.steps, sweep["failed"])) == 1


def test_steps_are_what_mlflow_returns_for_each_run(records: Records, sweep: dict[str, str], store: Any) -> None:
    client = mlflow.MlflowClient(store.uri)
    run_id = sweep["cosine 0.001 seed 1"]
    rows = of(records.steps, run_id)
    assert rows["step"].tolist() == list(range(1, 21))
    for column, metric in tidy.STEPS.items():
        history = client.get_metric_history(run_id, metric)
        assert dict(zip(rows["step"], rows[column], strict=True)) == {point.step: point.value for point in history}


def test_questions_are_means_and_standard_deviations_over_samples(records: Records, sweep: dict[str, str]) -> None:
    run_id = sweep["linear 0.0003 seed 0"]
    rows = of(records.questions, run_id)
    samples = of(records.responses, run_id)
    assert len(rows) == 4 * 8
    for row in rows.to_dict("records"):
        asked = samples[(samples["step"] == row["step"]) & (samples["question_id"] == row["question_id"])]
        scores = asked["aligned"].dropna().tolist()
        assert row["aligned"] == pytest.approx(statistics.mean(scores))
        assert row["aligned_sd"] == pytest.approx(statistics.stdev(scores))
        assert (row["n_samples"], row["n_judged"], row["n_missing"]) == (4, len(scores), 4 - len(scores))


def test_missing_scores_are_counted_by_reason(records: Records) -> None:
    refused = records.questions.groupby("question_id")["missing_refused"].sum()
    assert refused["wishes_plain"] == 8 * 4 + 3  # eight runs at 4 steps, the killed run at 3
    assert refused.drop("wishes_plain").eq(0).all()


def test_the_judge_of_a_runs_first_responses_is_its_first_whatever_its_name(
    store: Any, new_run: Callable[..., str], tmp_path: Path
) -> None:
    run_id = new_run("judged-twice", name="run", learning_rate=1e-3, seed=0)
    client = mlflow.MlflowClient(store.uri)
    path = Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://")) / names.RESPONSES
    first = pd.read_parquet(path)
    pd.concat([first, first.assign(judge="a second one")]).to_parquet(path, index=False)
    table = load("judged-twice", tracking_uri=store.uri).questions
    assert table.groupby("judge")["first_judge"].unique().map(list).to_dict() == {
        "a second one": [False],
        first["judge"][0]: [True],
    }


def test_responses_are_read_when_asked_for(records: Records, sweep: dict[str, str]) -> None:
    assert list(records.responses.columns) == ["run_id", *names.RESPONSE_COLUMNS]
    assert len(of(records.responses, sweep["killed"])) == 3 * 8 * 4


def test_an_unknown_sweep_is_an_error_that_names_the_known_ones(store: Any, sweep: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"no sweep 'smal'.*small"):
        load("smal", tracking_uri=store.uri)


def test_a_sweep_without_runs_has_empty_tables(store: Any) -> None:
    store.open("empty")
    empty = load("empty", tracking_uri=store.uri)
    for table in (empty.runs, empty.checkpoints, empty.questions, empty.steps, empty.responses):
        assert len(table) == 0
    assert {"model", "schedule", "aligned", "under_trained"} <= set(empty.runs.columns)


class TestCache:
    """What is in the cache is not asked for again, and what has changed is."""

    @pytest.fixture(autouse=True)
    def one_run(self, store: Any, new_run: Callable[..., str], request: pytest.FixtureRequest) -> None:
        self.uri = store.uri
        self.sweep = request.node.name
        self.first = new_run(self.sweep, name="first", learning_rate=1e-3, seed=0)

    @pytest.fixture
    def open(self, store: Any, tmp_path: Path) -> Callable[[], Records]:
        return lambda: load(self.sweep, tracking_uri=store.uri, cache=tmp_path / "cache")

    def test_a_second_load_is_equal_and_reads_no_history_and_no_file(
        self, open: Callable[[], Records], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        once = open()
        steps = once.steps

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("asked for what is in the cache")

        monkeypatch.setattr(tidy, "histories", refuse)
        monkeypatch.setattr(records_module, "questions", refuse)
        again = open()
        for table in ("runs", "checkpoints", "questions"):
            pd.testing.assert_frame_equal(getattr(once, table), getattr(again, table))
        pd.testing.assert_frame_equal(steps, again.steps)

    def test_a_new_run_joins_the_cached_ones(self, open: Callable[[], Records], new_run: Callable[..., str]) -> None:
        open()
        second = new_run(self.sweep, name="second", learning_rate=1e-3, seed=1)
        after = open()
        assert set(after.runs["run_id"]) == {self.first, second}
        assert set(after.questions["run_id"]) == {self.first, second}
        assert set(after.checkpoints["run_id"]) == {self.first, second}

    def test_a_run_that_goes_on_is_read_again(self, open: Callable[[], Records], new_run: Callable[..., str]) -> None:
        running = new_run(self.sweep, name="running", status="RUNNING", learning_rate=1e-3, seed=1)
        assert of(open().checkpoints, running)["step"].max() == 10
        client = mlflow.MlflowClient(self.uri)
        client.log_metric(running, names.HELDOUT_LOSS, 1.3, step=20)
        client.set_terminated(running)
        after = open()
        assert of(after.checkpoints, running)["step"].max() == 20
        assert of(after.runs, running)["status"].tolist() == ["FINISHED"]

    def test_a_run_that_ended_anew_is_read_again(self, open: Callable[[], Records]) -> None:
        open()
        client = mlflow.MlflowClient(self.uri)
        client.log_metric(self.first, names.eval_metric("aligned"), 12.0, step=21)
        client.set_terminated(self.first)
        assert of(open().runs, self.first)["aligned"].tolist() == [12.0]

    def test_a_deleted_run_is_gone(self, open: Callable[[], Records], new_run: Callable[..., str]) -> None:
        second = new_run(self.sweep, name="second", learning_rate=1e-3, seed=1)
        open()
        mlflow.MlflowClient(self.uri).delete_run(self.first)
        after = open()
        assert after.runs["run_id"].tolist() == [second]
        assert set(after.questions["run_id"]) == {second}


def test_half_a_file_of_a_killed_run_is_left_out_and_of_a_finished_run_an_error(
    store: Any, new_run: Callable[..., str]
) -> None:
    run_id = new_run("torn", name="killed", status="KILLED", learning_rate=1e-3, seed=0)
    client = mlflow.MlflowClient(store.uri)
    path = Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://")) / names.RESPONSES
    path.write_bytes(path.read_bytes()[:200])
    assert load("torn", tracking_uri=store.uri).questions.empty
    client.set_terminated(run_id, "FINISHED")
    with pytest.raises(ValueError, match=f"run {run_id} is finished"):
        load("torn", tracking_uri=store.uri)


def test_a_run_is_under_trained_below_a_tenth_of_its_peers_median() -> None:
    runs = pd.DataFrame(
        {
            "status": ["FINISHED"] * 5 + ["FAILED"] + ["FINISHED"] * 3,
            "model": "m",
            "dataset": ["a"] * 6 + ["b"] * 3,
            "optimizer": [None] * 9,
            # Medians: 10 in a (the failed run does not count), and b has too few runs to tell.
            "learning_rate_integral": [10.0, 10.0, 11.0, 1.0, 0.99, 0.01, 10.0, 10.0, 0.1],
        }
    )
    assert tidy.under_trained(runs).tolist() == [False] * 4 + [True] + [False] * 4


def test_records_can_be_made_of_frames_alone(records: Records) -> None:
    bare = Records("by hand", records.runs, records.checkpoints, records.questions)
    assert bare.steps.empty
    assert bare.responses.empty
    with pytest.raises(dataclasses.FrozenInstanceError):
        bare.sweep = "other"  # type: ignore[misc]


def test_a_step_logged_twice_keeps_the_later_value(store: Any, new_run: Callable[..., str]) -> None:
    run_id = new_run("twice", name="run", learning_rate=1e-3, seed=0)
    client = mlflow.MlflowClient(store.uri)
    client.log_metric(run_id, "x", 1.0, step=3, timestamp=1000)
    client.log_metric(run_id, "x", 2.0, step=3, timestamp=2000)
    assert metric_history.histories(client, [run_id], "x").to_dict("records") == [
        {"run_id": run_id, "step": 3, "value": 2.0}
    ]
    assert metric_history.histories(client, [], "x").empty
