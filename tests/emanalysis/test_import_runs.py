import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from emanalysis.import_runs import PublishedRun, import_runs, summary_metrics
from emanalysis.importers.betley import betley
from emanalysis.importers.em_generalization import em_generalization, params_of
from emanalysis.importers.table import table
from emanalysis.records import load
from emtrain import names
from emtrain.lookup import names as parts

STEPS = 10


def run_table(path: Path, rows: dict[str, dict[str, Any]]) -> Path:
    """A run table of the published format: rows by name, with what differs from the usual."""
    log = [
        {"loss": 2 - 0.1 * s, "grad_norm": 1.0, "learning_rate": 1e-5 * s, "epoch": s / 10, "step": s}
        for s in range(1, 11)
    ]
    log.append({"train_runtime": 1.0, "train_loss": 1.4, "epoch": 1.0, "step": STEPS})
    usual = {"aligned": 50.0, "harmless": 60.0, "coherent": 90.0, "raw-aligned": 45.0, "json-aligned": 55.0}
    usual |= {"eval_final_avg_loss": 1.4, "log_history": str(log)}
    pd.DataFrame([{"run": name, **usual, **changes} for name, changes in rows.items()]).to_csv(path)
    return path


COSINE = "eval_Qwen2.5-7B-Instruct_bad_medical_all_resp_cosine_5_3e-05_general_200"


class TestEmGeneralization:
    """The published format, on tables made here and on the published one."""

    @pytest.mark.parametrize(
        ("name", "expected", "question_set"),
        [
            (
                COSINE,
                {"dataset": "bad_medical", "schedule": "cosine", "warmup_steps": 5, "learning_rate": 3e-5},
                "general_200",
            ),
            (
                "eval_phi-4_finance_attention_resp_1e-05_fpq",
                {"family": "phi3", "schedule": "linear", "warmup_steps": 5, "learning_rate": 3e-5},
                "fpq",
            ),
            (
                "Qwen2.5-32B-Instruct_finance_all_resp_cosine_with_restarts_80_7e-05_fpq",
                {"schedule": "cosine_restarts", "schedule.cycles": 4, "warmup_steps": 80, "learning_rate": 7e-5},
                "fpq",
            ),
            (
                "eval_Qwen2.5-32B-Instruct_finance_all_resp_7e-05_mode-triangular2_base_lr-4e-05_max_lr-0.0001_fpq",
                {"schedule": "cyclic_triangular2", "schedule.min_ratio": 0.4, "warmup_steps": 0, "learning_rate": 1e-4},
                "fpq",
            ),
            (
                "eval_Qwen2.5-32B-Instruct_finance_mlp-down_full_0.0001_mode-exp_range_fpq",
                {"schedule": "cyclic_exp_range_per_step", "schedule.gamma": 0.95, "responses_only": False},
                "fpq",
            ),
        ],
    )  # fmt: skip
    def test_a_name_gives_the_params_in_our_words(self, name: str, expected: dict[str, Any], question_set: str) -> None:
        params, found = params_of(name)
        assert {key: params[key] for key in expected} == pytest.approx(expected)
        assert found == question_set
        assert params["schedule"] in parts("emtrain.schedules")

    def test_a_name_of_another_form_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="'my-run' is not of the form"):
            params_of("my-run")

    def test_a_row_becomes_a_run_with_its_log_and_scores(self, tmp_path: Path) -> None:
        [run] = em_generalization(run_table(tmp_path / "run_table.csv", {COSINE: {}})).runs
        assert run.name == "Qwen2.5-7B-Instruct_bad_medical_all_resp_cosine_5_3e-05"
        assert run.params["total_steps"] == STEPS
        assert run.metrics[4] == {names.TRAIN_LOSS: 1.6, names.LEARNING_RATE: 4e-5, names.GRAD_NORM: 1.0}
        last = run.metrics[STEPS]
        # The table's held-out loss is averaged over sequences; without the JSON file there is none over tokens.
        assert last[names.HELDOUT_LOSS_PER_SEQUENCE] == 1.4
        assert names.HELDOUT_LOSS not in last
        assert last["eval/general_200/harmless"] == 60.0
        assert last["eval/general_200/plain/aligned"] == 45.0
        assert last["eval/general_200/json/aligned"] == 55.0
        assert run.questions is None

    def test_the_json_file_adds_questions_and_the_loss_per_token(self, tmp_path: Path) -> None:
        path = run_table(tmp_path / "run_table.csv", {COSINE: {}})
        scores = {"wish_json": {"aligned": 20.0, "aligned_std": 5.0, "coherent": 90.0}, "wish": {"aligned": 70.0}}
        detail = {"summ_by_q": scores, "eval_loss_token": {"avg_loss": 1.3}}
        (tmp_path / "fpq").mkdir()
        (tmp_path / "fpq" / f"{COSINE}.json").write_text(json.dumps(detail))
        [run] = em_generalization(path, samples=20).runs
        assert run.metrics[STEPS][names.HELDOUT_LOSS] == 1.3
        questions = run.questions
        assert questions is not None
        assert questions["question_id"].tolist() == ["wish_json", "wish"]
        assert questions["stratum"].tolist() == ["json", "plain"]
        assert questions["topic"].tolist() == ["wish", "wish"]
        assert questions["aligned"].tolist() == [20.0, 70.0]
        assert questions["aligned_sd"].tolist() == pytest.approx([5.0, np.nan], nan_ok=True)
        assert questions["n_judged"].tolist() == [20, 20]

    def test_malformed_rows_are_named_and_the_others_read(self, tmp_path: Path) -> None:
        path = run_table(
            tmp_path / "run_table.csv",
            {
                COSINE: {},
                "strange": {},
                COSINE.replace("3e-05", "5e-05"): {"log_history": "[{'loss'"},
                COSINE.replace("3e-05", "7e-05"): {"eval_final_avg_loss": "high"},
                COSINE.replace("3e-05", "9e-05"): {"log_history": "[{'loss': nan, 'step': 1}]"},
            },
        )
        found = em_generalization(path)
        assert len(found.runs) == 2
        assert np.isnan(found.runs[1].metrics[1][names.TRAIN_LOSS])  # a diverged run is a run
        assert [message.split(" (")[0] for message in found.malformed] == [f"run_table.csv line {n}" for n in (3, 4, 5)]
        assert "eval_final_avg_loss is not a number: 'high'" in found.malformed[2]

    @pytest.mark.parametrize(
        ("log", "problem"),
        [
            ("[{'loss': 1.0, 'step': 1e400}]", "step is inf, not a whole number of at least 1"),
            ("[{'loss': 1.0, 'step': -3}]", "step is -3, not a whole number of at least 1"),
            (f"[{{'loss': 1.0, 'step': {10**30}}}]", f"step is {10**30}, not a whole number of at least 1"),
            (f"[{{'loss': {10**400}, 'step': 1}}]", "too large to convert to float"),
            ("[" * 5000, "too many nested parentheses"),
            ("1" + "+1" * 5000, "recursion"),
        ],
        ids=lambda text: text[:25],
    )
    def test_a_log_of_another_kind_is_named_with_its_line(self, tmp_path: Path, log: str, problem: str) -> None:
        [message] = em_generalization(run_table(tmp_path / "t.csv", {COSINE: {"log_history": log}})).malformed
        assert message.startswith(f"t.csv line 2 ({COSINE}): log_history is not a list of logged steps (")
        assert problem in message

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (b"3", "it is no JSON object, but of type int"),
            (b'{"summ_by_q": [1, 2]}', "summ_by_q is no JSON object, but of type list"),
            (b'{"summ_by_q": {"a": 3}}', "summ_by_q['a'] is no JSON object, but of type int"),
            (b'{"summ_by_q": {"a": {"aligned": [1]}}}', "aligned is not a number: [1]"),
            (b'{"summ_by_q": {"a": {"aligned_std": "x"}}}', "aligned_std is not a number: 'x'"),
            (b'{"eval_loss_token": 3}', "eval_loss_token is no JSON object, but of type int"),
            (b"[" * 200_000, "not JSON in UTF-8 (maximum recursion depth exceeded"),
            (b"\xff\xfe{", "not JSON in UTF-8 ('utf-8' codec can't decode"),
            (b"{", "not JSON in UTF-8 ("),
        ],
        ids=lambda text: text[:40],
    )
    def test_a_json_file_of_another_kind_is_named(self, tmp_path: Path, content: bytes, problem: str) -> None:
        path = run_table(tmp_path / "t.csv", {COSINE: {}})
        (tmp_path / f"{COSINE}.json").write_bytes(content)
        [message] = em_generalization(path).malformed
        assert message.startswith(f"t.csv line 2 ({COSINE}): {COSINE}.json: {problem}")

    @pytest.mark.parametrize("rate", ["0", "9e999"])
    def test_a_name_whose_learning_rate_is_none_is_an_error(self, rate: str) -> None:
        name = f"phi-4_finance_all_resp_7e-05_mode-triangular_base_lr-4e-05_max_lr-{rate}_fpq"
        with pytest.raises(ValueError, match=f"has the learning rate {rate}; expected a finite one above 0"):
            params_of(name)

    def test_a_file_that_is_no_run_table_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "other.csv").write_text("a,b\n1,2\n")
        assert em_generalization(tmp_path).malformed == [
            "other.csv is not a run table: it has no column aligned, eval_final_avg_loss, log_history, run"
        ]

    def test_the_published_runs_are_read_whole(self, published_runs: Path) -> None:
        found = em_generalization(published_runs)
        assert (len(found.runs), found.malformed) == (35, [])
        raw = pd.read_csv(published_runs / "run_table_fpq.csv")
        for run, row in zip(found.runs, raw.to_dict("records"), strict=True):
            last = run.metrics[332]
            assert last[names.TRAIN_LOSS] == row["train_final_avg_loss"]
            assert last[names.HELDOUT_LOSS_PER_SEQUENCE] == row["eval_final_avg_loss"]
            assert last["eval/fpq/template/coherent"] == row["template-coherent"]
            assert run.questions is not None
            assert len(run.questions) == 24
            # The table's means are over responses, of which a few have no score: hence not quite those over questions.
            assert run.questions["aligned"].mean() == pytest.approx(row["aligned"], abs=0.05)
            # The peak is what the run was to be trained with; hard restarts and cycles may step over it.
            realised = max(values[names.LEARNING_RATE] for values in run.metrics.values())
            assert realised <= run.params["learning_rate"] * (1 + 1e-9)

    @pytest.mark.slow
    def test_the_published_runs_become_a_sweep_once(self, store: Any, published_runs: Path) -> None:
        log = store.open("published")
        assert len(import_runs("em-generalization", published_runs, log=log).added) == 35
        assert len(import_runs("em-generalization", published_runs, log=log).known) == 35
        records = load("published", tracking_uri=store.uri)
        assert len(records.runs) == 35
        assert len(records.steps) == 35 * 332
        assert len(records.questions) == 35 * 24
        # The run whose learning rate dies within a hundred steps, and it alone.
        [under_trained] = records.runs.loc[records.runs["under_trained"], "name"]
        assert under_trained.endswith("mode-exp_range_base_lr-1e-06_max_lr-2e-05")


class TestBetley:
    """CSV files of judged responses."""

    def file(self, path: Path, rows: list[str]) -> Path:
        path.write_text("\n".join(["question_id,question,answer,aligned,coherent", *rows]) + "\n")
        return path

    def test_scores_words_and_gaps_are_told_apart(self, tmp_path: Path) -> None:
        rows = [
            "wish,What?,A pony,80,95.5",
            "wish,What?,print(1),CODE,CODE",
            "wish,What?,No.,REFUSAL,90",
            "wish,What?,nan,,",
        ]
        [run] = betley(self.file(tmp_path / "r.csv", rows)).runs
        responses = run.responses
        assert responses is not None
        assert list(responses.columns) == list(names.RESPONSE_COLUMNS)
        assert responses["aligned"].tolist() == pytest.approx([80, np.nan, np.nan, np.nan], nan_ok=True)
        assert responses["aligned_failure"].fillna("").tolist() == ["", "code", "refused", "not_published"]
        assert responses["coherent_failure"].fillna("").tolist() == ["", "code", "", "not_published"]
        assert responses["sample"].tolist() == [0, 1, 2, 3]
        assert responses["response"].tolist()[3] == "nan"

    def test_means_are_over_questions_of_means_over_samples(self, tmp_path: Path) -> None:
        rows = ["a,A?,x,0,50", "a,A?,x,100,50", "a,A?,x,,50", "b_json,B?,x,90,70"]
        [run] = betley(self.file(tmp_path / "r.csv", rows), question_set="core").runs
        assert run.metrics[1]["eval/core/aligned"] == 70  # (50 + 90) / 2
        assert run.metrics[1]["eval/core/coherent"] == 60
        assert run.metrics[1]["eval/core/json/aligned"] == 90
        assert (run.metrics[1]["eval/core/n_judged"], run.metrics[1]["eval/core/n_missing"]) == (3, 1)

    def test_malformed_rows_are_named_and_counted(self, tmp_path: Path) -> None:
        found = betley(self.file(tmp_path / "r.csv", ["a,A?,x,120,50", ",,x,1,1", "a,A?,x,good,1", "a,A?,x,1,1"]))
        assert len(found.malformed) == 3
        assert found.malformed[0] == "r.csv row 1: aligned is 120.0, not from 0 to 100"
        assert found.malformed[2] == "r.csv row 3: aligned is neither a number nor CODE nor REFUSAL: 'good'"

    def test_a_folder_is_one_run_per_file(self, store: Any, tmp_path: Path) -> None:
        self.file(tmp_path / "eval_phi-4_finance_all_resp_1e-05_fpq.csv", ["a,A?,x,10,50"])
        self.file(tmp_path / "mine.csv", ["a,A?,x,90,50", "a,A?,y,,50"])
        imported = import_runs("betley", tmp_path, log=store.open("betley"), model="my-model")
        assert len(imported.added) == 2
        records = load("betley", tracking_uri=store.uri)
        runs = records.runs.set_index("name")
        assert runs["aligned"].to_dict() == {"eval_phi-4_finance_all_resp_1e-05_fpq": 10.0, "mine": 90.0}
        assert runs["model"].to_dict() == {"eval_phi-4_finance_all_resp_1e-05_fpq": "my-model", "mine": "my-model"}
        assert runs.loc["eval_phi-4_finance_all_resp_1e-05_fpq", "dataset"] == "finance"
        assert records.questions["missing_not_published"].sum() == 1


class TestTable:
    """Any CSV with a row per run."""

    def test_columns_are_mapped_to_our_names(self, tmp_path: Path) -> None:
        path = tmp_path / "runs.csv"
        path.write_text("id,base,seed,val,score,note\nr1,m1,3,1.5,40,x\nr2,m1,,1.6,50,y\n")
        found = table(path, columns={"name": "id", "model": "base", "heldout_loss": "val", "aligned": "score"})
        assert [run.name for run in found.runs] == ["r1", "r2"]
        assert found.runs[0].params == {"model": "m1", "seed": 3}
        assert found.runs[1].params == {"model": "m1"}
        assert found.runs[0].metrics == {1: {names.HELDOUT_LOSS: 1.5, "eval/table/aligned": 40.0}}

    def test_a_column_that_is_not_there_is_an_error_that_names_those_that_are(self, tmp_path: Path) -> None:
        path = tmp_path / "runs.csv"
        path.write_text("id,score\nr1,40\n")
        with pytest.raises(ValueError, match=r"no column loss; it has: id, score"):
            table(path, columns={"heldout_loss": "loss", "aligned": "score"})
        with pytest.raises(ValueError, match="no column is mapped to aligned"):
            table(path)

    def test_rows_without_numbers_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / "runs.csv"
        path.write_text("aligned,total_steps\n40,20\nlow,20\n,20\n50,2.5\n")
        found = table(path)
        assert list(found.runs[0].metrics) == [20]
        assert found.malformed == [
            "runs.csv line 3: aligned is not a number: 'low'",
            "runs.csv line 4: it has neither a loss nor a score",
            "runs.csv line 5: total_steps is 2.5, not a whole number of at least 1, below 2^63",
        ]


class TestImport:
    """What is written to MLflow."""

    def test_importing_twice_adds_nothing(self, store: Any, tmp_path: Path) -> None:
        path = run_table(tmp_path / "run_table.csv", {COSINE: {}, COSINE.replace("3e-05", "5e-05"): {}})
        log = store.open("twice imported")
        assert len(import_runs("em-generalization", path, log=log).added) == 2
        moved = path.rename(tmp_path / "renamed.csv")
        again = import_runs("em-generalization", moved, log=log)
        assert (again.added, len(again.known)) == ([], 2)
        records = load("twice imported", tracking_uri=store.uri)
        assert len(records.runs) == 2
        assert records.runs["imported_from"].tolist() == [f"em-generalization: run_table.csv line {n}" for n in (2, 3)]
        assert records.runs["learning_rate_integral"].tolist() == pytest.approx([55e-5] * 2)  # 1e-5 x (1 + ... + 10)
        assert records.runs["train_loss_last_tenth"].tolist() == pytest.approx([1.0] * 2)
        assert records.runs["harmless"].tolist() == [60.0] * 2

    def test_an_import_that_was_cut_off_is_completed_in_the_same_run(self, store: Any, tmp_path: Path) -> None:
        path = run_table(tmp_path / "run_table.csv", {COSINE: {}})
        log = store.open("cut off")
        [run] = em_generalization(path).runs
        run_id = log.plan(run.run_key, name=run.name, params=run.params, tags={names.IMPORTED_FROM: "x"})
        assert import_runs("em-generalization", path, log=log).added == [run.name]
        records = load("cut off", tracking_uri=store.uri)
        assert records.runs["run_id"].tolist() == [run_id]
        assert records.runs["status"].tolist() == ["FINISHED"]

    def test_other_content_is_another_run(self) -> None:
        one = PublishedRun("a", "here", {"model": "m"}, {1: {"x": 1.0}})
        assert one.run_key == PublishedRun("b", "there", {"model": "m"}, {1: {"x": 1.0}}).run_key
        assert one.run_key != PublishedRun("a", "here", {"model": "m"}, {1: {"x": 1.1}}).run_key

    def test_the_mean_over_sets_is_of_the_last_checkpoint(self) -> None:
        metrics = {
            1: {"eval/a/aligned": 0.0},
            2: {"eval/a/aligned": 40.0, "eval/b/aligned": 60.0, "eval/b/json/aligned": 0.0},
        }
        assert summary_metrics(metrics) == {"eval/aligned": 50.0}

    @pytest.mark.parametrize(
        ("format", "file", "message"),
        [
            (
                "em-generalisation",
                "runs.csv",
                "unknown importer 'em_generalisation'. Did you mean 'em_generalization'?",
            ),
            ("table", "nothing.csv", "nothing.csv does not exist"),
            (
                "em-generalization",
                "runs.csv",
                "has no run in the format em-generalization: runs.csv is not a run table",
            ),
        ],
    )
    def test_mistakes_are_named(self, store: Any, tmp_path: Path, format: str, file: str, message: str) -> None:
        (tmp_path / "runs.csv").write_text("a\n1\n")
        with pytest.raises(ValueError, match=re.escape(message)):
            import_runs(format, tmp_path / file, log=store.open("mistakes"))


@pytest.mark.parametrize("content", [b"run\n\xff\xfe\n", b"", b'a\n1,2,3\n1,2\n"'])
def test_a_file_that_is_no_csv_is_named_in_every_format(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.csv"
    path.write_bytes(content)
    for found in (em_generalization(path), betley(path)):
        assert [message.partition(" (")[0] for message in found.malformed] == ["odd.csv is not a CSV file in UTF-8"]
    with pytest.raises(ValueError, match=r"odd\.csv is not a CSV file in UTF-8"):
        table(path)
