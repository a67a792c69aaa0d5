from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from emanalysis.analyses.loss_vs_alignment import association, loss_vs_alignment
from emanalysis.import_runs import import_runs
from emanalysis.records import Records, load
from emanalysis.report import plain
from emtrain.tracking import SweepLog


@pytest.fixture
def falling(sweep_of: Callable[..., Records]) -> Records:
    """Alignment falls with the loss, that of JSON answers three times as fast; schedules differ by 4 points."""
    rng = np.random.default_rng(0)

    def score(run: dict[str, float], question: str) -> float:
        rate = 3 if question.endswith("json") else 1
        return 50 + 60 * rate * np.log(run["heldout_loss"] / 2) + 4 * (run["schedule"] == "linear") + rng.normal(0, 1)

    return sweep_of(score)


def test_every_group_score_and_loss_has_a_row_with_interval_and_n(falling: Records) -> None:
    result = loss_vs_alignment.compute(falling, seed=0)
    table = pd.DataFrame(result["associations"])
    assert len(table) == 3 * 2 * 4  # strata x scores x losses
    own = table[(table["score"] == "aligned") & (table["loss"] == "heldout_loss")].set_index("stratum")
    assert own["n_runs"].tolist() == [18, 18, 18]
    assert own["n_cells"].tolist() == [6, 6, 6]
    assert own.loc["json", "slope_per_percent"] == pytest.approx(1.8, abs=0.1)
    assert own.loc["plain", "slope_per_percent"] == pytest.approx(0.6, abs=0.1)
    for name in ("pearson", "pearson_log", "spearman", "slope_per_percent"):
        assert (own[f"{name}_low"] < own[name]).all()
        assert (own[name] < own[f"{name}_high"]).all()
    assert (own["without_one_low"] <= own["pearson_log"]).all()
    assert "by answer format: json" in result["answer"]


def test_the_ladder_credits_schedules_with_what_the_loss_leaves(falling: Records) -> None:
    table = pd.DataFrame(loss_vs_alignment.compute(falling, seed=0)["r2_ladder"])
    loss, optimiser, schedule = table[table["stratum"] == "all questions"].to_dict("records")
    assert loss["r2"] < 0.97 < 0.99 < schedule["r2"]
    assert schedule["p"] < 0.01
    assert np.isnan(optimiser["p"])
    assert schedule["n_cells"] == 6


def test_models_with_hardly_fewer_parameters_than_cells_are_left_out_and_counted(
    sweep_of: Callable[..., Records], falling: Records
) -> None:
    """Intercept and log loss are 2 parameters, and 3 with the schedule: of 4 cells, the first two rungs are told."""
    rng = np.random.default_rng(0)
    of_four = sweep_of(lambda run, question: 50 + rng.normal(0, 5), rates=(1e-5, 3e-5))
    result = plain(loss_vs_alignment.compute(of_four, seed=0))
    rows = [row for row in result["r2_ladder"] if row["stratum"] == "all questions"]
    assert [(row["added"], row["parameters"]) for row in rows] == [("log loss", 2), ("+ optimiser", 2)]
    assert "Of 9 models of what explains alignment, 3 were left out" in result["notes"][-1]
    of_two = sweep_of(lambda run, question: 50 + rng.normal(0, 5), rates=(1e-5,))
    result = plain(loss_vs_alignment.compute(of_two, seed=0))
    assert result["r2_ladder"] == []
    assert [figure.table for figure in loss_vs_alignment.figures(result)] == ["points", "associations"]
    assert loss_vs_alignment.compute(falling, seed=0)["notes"] == []


def test_under_trained_runs_are_in_and_out(falling: Records) -> None:
    runs = falling.runs.assign(under_trained=falling.runs["seed"] == 0)
    table = pd.DataFrame(
        loss_vs_alignment.compute(Records("x", runs, falling.checkpoints, falling.questions), seed=0)["associations"]
    )
    counts = table.groupby("runs")["n_runs"].unique()
    assert (counts["all"].tolist(), counts["without under-trained"].tolist()) == ([18], [12])


def test_few_runs_give_a_reason(sweep_of: Callable[..., Records]) -> None:
    few = sweep_of(lambda run, question: 50.0, seeds=1, rates=(1e-5,))
    assert "at least 4 finished, scored runs" in loss_vs_alignment.compute(few, seed=0)["reason"]


def test_constant_scores_have_no_correlation_and_break_nothing(sweep_of: Callable[..., Records]) -> None:
    result = plain(loss_vs_alignment.compute(sweep_of(lambda run, question: 50.0), seed=0))
    assert all(row["pearson"] is None for row in result["associations"])
    assert loss_vs_alignment.figures(result)


def test_runs_of_one_and_the_same_loss_break_nothing(falling: Records) -> None:
    runs = falling.runs.assign(heldout_loss=2.0, train_loss=[np.inf] * 17 + [-1.0])
    result = plain(loss_vs_alignment.compute(Records("x", runs, falling.checkpoints, falling.questions), seed=0))
    assert {row["loss"] for row in result["associations"]} == {
        *("heldout_loss", "heldout_loss_per_sequence", "train_loss_last_tenth"),
    }
    assert loss_vs_alignment.figures(result)


def test_figures_name_tables_of_the_result(falling: Records) -> None:
    result = plain(loss_vs_alignment.compute(falling, seed=0))
    drawn = loss_vs_alignment.figures(result)
    assert [figure.table for figure in drawn] == ["points", "associations", "r2_ladder"]
    assert all(result[figure.table] for figure in drawn)


@pytest.mark.slow
def test_published_runs_give_the_published_numbers_by_format(published_runs: Path, tmp_path: Path) -> None:
    """Correlations with log loss, and the run-to-run scatter about the line without the under-trained run: raw 1.8,
    json 10.7, template 3.2 points."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    import_runs("em-generalization", published_runs, log=SweepLog.open("fpq", uri=uri, artifacts=tmp_path))
    result = loss_vs_alignment.compute(load("fpq", tracking_uri=uri), seed=0)
    table = pd.DataFrame(result["associations"]).set_index(["stratum", "score", "loss", "runs"])["pearson_log"]
    whole = table["all questions"]
    assert whole["aligned", "train_loss", "all"] == pytest.approx(0.8341, abs=5e-5)
    assert whole["aligned", "heldout_loss_per_sequence", "all"] == pytest.approx(0.8291, abs=5e-5)
    assert whole["harmless", "train_loss", "all"] == pytest.approx(0.8286, abs=5e-5)
    assert whole["harmless", "heldout_loss_per_sequence", "all"] == pytest.approx(0.8240, abs=5e-5)
    rows = pd.DataFrame(result["associations"])
    own = (rows["score"] == "aligned") & (rows["loss"] == "heldout_loss_per_sequence")
    found = rows[own & (rows["runs"] == "without under-trained")].set_index("stratum")["residual_sd"]
    assert found.to_dict() == pytest.approx(
        {"plain": 1.77, "json": 10.73, "template": 3.23, "all questions": 4.47}, abs=0.01
    )


def test_partial_correlation_given_the_learning_rates_is_left_out_where_there_are_none(falling: Records) -> None:
    runs = falling.runs.assign(cell=np.repeat(np.arange(6), 3), aligned=np.arange(18.0), learning_rate_integral=np.nan)
    row = association(runs, "aligned", "heldout_loss")
    assert np.isnan(row["partial_given_log_learning_rate_integral"])
    assert np.isfinite(row["pearson_log"])
