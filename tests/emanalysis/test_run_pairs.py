from collections.abc import Callable

import numpy as np

from emanalysis.comparable import settings
from emanalysis.records import Records
from emanalysis.run_pairs import OTHERS, SCHEDULES, SEEDS, WHY, choose, relations, without_adapters


def study(sweep_of: Callable[..., Records]) -> Records:
    """Three learning rates x two schedules x three seeds; equal losses at a learning rate and seed."""
    records = sweep_of(lambda run, question: 90 - 1e5 * run["learning_rate"] * (1 + (run["schedule"] == "linear")))
    runs = records.runs.assign(imported_from=None, total_steps=20)
    aligned = records.checkpoints[records.checkpoints["stratum"].isna() & (records.checkpoints["step"] == 20)]
    return Records("test", runs.assign(aligned=aligned["aligned"].to_numpy()), records.checkpoints, records.questions)


def test_runs_differ_by_seed_by_schedule_or_otherwise(sweep_of: Callable[..., Records]) -> None:
    records = study(sweep_of)
    found = relations(records.runs, settings(records))
    names = records.runs["name"].tolist()

    def relation(a: str, b: str) -> str:
        return str(found[names.index(a), names.index(b)])

    assert relation("linear 1e-05 seed 0", "linear 1e-05 seed 2") == SEEDS
    # The cycles of the restarts are part of the schedule.
    assert relation("linear 1e-05 seed 0", "cosine_restarts 1e-05 seed 1") == SCHEDULES
    assert relation("linear 1e-05 seed 0", "linear 3e-05 seed 0") == OTHERS


def test_pairs_are_taken_in_turn_and_the_choice_is_told_and_repeatable(sweep_of: Callable[..., Records]) -> None:
    records = study(sweep_of)
    pairs = choose(records, per_group=9, seed=0)
    assert len(pairs) == 9
    assert pairs["why"].tolist()[:4] == list(WHY)
    first = pairs.iloc[0]
    by_id = records.runs.set_index("run_id")
    # Of runs with equal loss the most different ones: the two schedules at the highest learning rate.
    assert {first["run_a"].rpartition("-")[0], first["run_b"].rpartition("-")[0]} == {
        "linear-0.0001",
        "cosine_restarts-0.0001",
    }
    equal = pairs[pairs["why"] == WHY[0]]
    gaps = abs(by_id.loc[equal["run_a"], "heldout_loss"].to_numpy() / by_id.loc[equal["run_b"], "heldout_loss"] - 1)
    assert gaps.max() < 0.021
    assert not pairs.duplicated(["run_a", "run_b"]).any()
    assert set(pairs["step_a"]) == {20}
    assert choose(records, per_group=9, seed=0).equals(pairs)
    assert not choose(records, per_group=9, seed=1).equals(pairs)


def test_runs_without_adapters_are_left_out_with_their_reason(sweep_of: Callable[..., Records]) -> None:
    records = study(sweep_of)
    runs = records.runs.assign(adapter=np.nan).astype({"adapter": object})
    runs.loc[0, "adapter"], runs.loc[1, "imported_from"], runs.loc[2, "status"] = "full", "table:x.csv", "FAILED"
    runs.loc[3, "weights_kept"] = "none"
    found = without_adapters(runs).set_index("run_id")["reason"]
    assert found.to_dict() == {
        "linear-3e-05-0": "its adapter was not kept (resources.keep_weights: none)",
        "linear-1e-05-0": "all its weights were trained, so it has no adapter",
        "linear-1e-05-1": "it was imported, without an adapter",
        "linear-1e-05-2": "it is not finished",
    }
    records = Records("test", runs, records.checkpoints, records.questions)
    pairs = choose(records, per_group=1000, seed=0)
    assert not set(found.index) & {*pairs["run_a"], *pairs["run_b"]}
