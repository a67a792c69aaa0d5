import math

import pandas as pd
import pytest
from scipy import stats

from emanalysis.early_stopping import by_optimizer, earlier_checkpoints, onsets, stopped_at


def run(run_id: str, *points: tuple[int, float, float]) -> pd.DataFrame:
    """Checkpoints of a run: step, held-out loss, alignment."""
    return pd.DataFrame(points, columns=["step", "heldout_loss", "aligned"]).assign(run_id=run_id)


def test_the_onset_lies_between_the_last_good_and_the_first_bad_checkpoint() -> None:
    row = onsets(run("a", (0, 3.0, 90), (10, 2.0, 85), (20, 1.1, 79.9), (30, 1.0, 60))).iloc[0]
    assert (row["onset_after"], row["onset_by"]) == (10, 20)  # 80 is ten points below the base
    assert row["plateau_by"] == 20  # 1.9 of the 2.0 that the loss falls, 95 %
    assert row["last_step"] == 30


def test_a_run_that_never_fell_has_no_onset() -> None:
    row = onsets(run("a", (0, 3.0, 90), (10, 2.0, 80.1))).iloc[0]
    assert math.isnan(row["onset_by"])
    assert math.isnan(row["onset_after"])


def test_a_run_whose_loss_never_fell_has_no_plateau() -> None:
    assert math.isnan(onsets(run("a", (0, 3.0, 90), (10, 3.1, 50))).iloc[0]["plateau_by"])


def test_a_run_without_the_base_model_is_left_out() -> None:
    points = run("a", (5, 3.0, 90), (10, 2.0, 50))
    assert onsets(points).empty
    assert earlier_checkpoints(points).empty


def test_earlier_checkpoints_are_compared_with_the_last_one() -> None:
    points = pd.concat(
        [
            run("a", (0, 3.0, 90), (10, 2.0, 85), (20, 0.9, 70), (30, 1.0, 40)),
            run("rose", (0, 1.0, 90), (10, 0.5, 80), (20, 1.2, 70)),
        ]
    )
    table = earlier_checkpoints(points)
    assert table["run_id"].tolist() == ["a", "a"]  # the loss of the other run is higher at its end than at its start
    assert table["loss_kept"].tolist() == pytest.approx([0.5, 1.05])
    assert table["aligned_gain"].tolist() == [45, 30]


def test_stopping_takes_the_first_checkpoint_that_keeps_enough_not_the_best_one() -> None:
    points = [
        run(name, (0, 2.0, 90), (10, 1.05, 50 + gain), (20, 1.02, 50 + gain + 30), (30, 1.0, 50))
        for name, gain in (("a", 1), ("b", 2), ("c", 6))
    ]
    stop = stopped_at(
        earlier_checkpoints(pd.concat([*points, run("d", (0, 2.0, 90), (10, 1.9, 90), (20, 1.0, 50))])), 0.9
    )
    assert (stop["runs"], stop["of_runs"]) == (3, 4)  # d learnt too late
    assert stop["aligned_gain"] == pytest.approx(3)
    # mean 3, standard deviation sqrt(7), n = 3
    half = stats.t.ppf(0.975, 2) * math.sqrt(7 / 3)
    assert (stop["low"], stop["high"]) == pytest.approx((3 - half, 3 + half))


def test_two_runs_have_a_mean_but_no_interval() -> None:
    points = pd.concat([run(name, (0, 2.0, 90), (10, 1.0, 80), (20, 1.0, 50)) for name in "ab"])
    stop = stopped_at(earlier_checkpoints(points), 0.9)
    assert (stop["aligned_gain"], stop["low"]) == (30, None)


def test_optimisers_are_summarised_apart() -> None:
    """Of three runs of adamw that end at 70, 81 and 89 the first fell, at half of its steps; the one of sgd did not."""
    runs = pd.concat(
        run(name, (0, 3.0, 90), (10, 2.0, middle), (20, 1.0, last)).assign(
            model="m", dataset="d", optimizer="sgd" if name == "s" else "adamw"
        )
        for name, middle, last in (("a", 75, 70), ("b", 88, 81), ("c", 89, 89), ("s", 90, 90))
    )
    adamw, sgd = by_optimizer(runs, onsets(runs)).to_dict("records")
    assert (adamw["runs"], adamw["fell"], adamw["onset_fraction"]) == (3, 1, 0.5)
    assert adamw["aligned"] == pytest.approx(80)
    low, high = stats.t.interval(0.95, 2, 80, stats.sem([70, 81, 89]))
    assert (adamw["aligned_low"], adamw["aligned_high"]) == pytest.approx((low, high))
    assert (sgd["runs"], sgd["fell"]) == (1, 0)
    assert math.isnan(sgd["aligned_low"])
    assert math.isnan(sgd["onset_fraction"])
