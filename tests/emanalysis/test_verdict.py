import importlib.util
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from emanalysis.null_sweep import null_reference
from emanalysis.score_matrix import ScoreMatrix
from emanalysis.verdict import Verdict, decide


def sweep(
    seed: int, *, better_by: float = 0.0, seeds: int = 6, sd: float = 1.5, cells: int = 6, topics: int = 12
) -> ScoreMatrix:
    """Cells along a line in log loss, 3 points apart; cell 2 has the loss of cell 3 and is better by ``better_by``."""
    rng = np.random.default_rng(seed)
    cell = np.repeat(np.arange(cells), seeds)
    level = np.array([0.0, 1, 3, 3, 4, 5, 6, 7])[cell]
    driver = 30 + 3 * level + better_by * (cell == 2)
    scores = driver[:, None] + rng.normal(0, sd, (len(cell), 1)) + rng.normal(0, 15, topics)
    scores = scores + rng.normal(0, 2 * sd, (cells, topics))[cell] + rng.normal(0, 2 * sd, (len(cell), topics))
    return ScoreMatrix(
        scores=scores,
        response_sd=np.full(scores.shape, 10.0),
        responses=np.full(scores.shape, 10.0),
        loss=np.exp(0.01 * level + rng.normal(0, 1e-4, len(cell))),
        cell=cell,
        seed=np.tile(np.arange(seeds), cells),
        cluster=np.arange(topics),
    )


def verdict(matrix: ScoreMatrix, **options: float) -> Verdict:
    return decide(matrix, rng=np.random.default_rng(0), **options)


def test_a_planted_better_cell_is_found_with_its_effect() -> None:
    found = verdict(sweep(0, better_by=12))
    assert (found.outcome, found.better) == ("found", 2)
    assert found.interval[0] < 12 < found.interval[1]
    assert found.p < 0.01
    assert (found.cells, found.margin) == (6, 5.0)


def test_without_an_effect_and_with_little_noise_gains_are_excluded() -> None:
    found = verdict(sweep(0, sd=0.5, seeds=8))
    assert found.outcome == "not found"
    assert found.largest_gain < 5
    assert "gains of 5 points or more are excluded" in found.reason


def test_without_an_effect_and_with_much_noise_nothing_is_said() -> None:
    found = verdict(sweep(0, sd=8))
    assert found.outcome == "can't tell"
    assert found.largest_gain > 5
    assert found.detectable > 10


def test_the_luck_that_made_a_trial_win_its_search_is_no_evidence_for_it() -> None:
    """Of cell 2, seeds 0 and 1 are 20 points up, as those of a search's winner may be; the confirmation's are not."""
    plain = sweep(0, seeds=5, sd=1.0)
    lucky = (plain.cell == 2) & (plain.seed < 2)
    won = replace(plain, scores=plain.scores + 20.0 * lucky[:, None])
    known = replace(won, unsearched=plain.seed >= 2)
    found = verdict(known)
    assert (found.outcome, found.better) == ("not found", 2)
    luckier = verdict(replace(known, scores=known.scores + 20.0 * lucky[:, None]))
    assert (luckier.effect, luckier.largest_gain) == (found.effect, found.largest_gain)
    # By thirds, seed 1 is one of four that confirm, and lifts their mean by 5.
    assert verdict(won).effect == pytest.approx(found.effect + 5, abs=2)
    assert found.design.search_seeds == 2
    unconfirmed = known.take(runs=(known.cell < 4) | ~known.unsearched)
    assert verdict(unconfirmed).cells == 4
    alone = known.take(runs=(known.cell == 2) | ~known.unsearched)
    assert (
        "at least 2 seeds of a configuration that the search has not seen to tell an effect from luck, and 1 of"
        in verdict(alone).reason
    )


def test_one_seed_a_cell_can_not_tell_whatever_the_gap() -> None:
    found = verdict(sweep(0, better_by=60, seeds=1))
    assert found.outcome == "can't tell"
    assert found.better is None
    assert "null sweep" in found.reason


@pytest.mark.parametrize(("better_by", "outcome"), [(60.0, "found"), (0.0, "can't tell")])
def test_one_seed_a_cell_is_judged_by_a_null_sweep(better_by: float, outcome: str) -> None:
    single, many = sweep(0, better_by=better_by, seeds=1), sweep(1, seeds=12)
    luck = null_reference(single, many.take(runs=many.cell == 2), rng=np.random.default_rng(0))
    found = decide(single, rng=np.random.default_rng(0), null=luck)
    assert found.outcome == outcome
    assert found.better is not None
    if outcome == "found":
        assert found.interval[0] < 60 < found.interval[1]


def test_cells_with_too_few_seeds_are_left_out_and_the_others_keep_their_numbers() -> None:
    matrix = sweep(0, better_by=12)
    short = matrix.take(runs=(matrix.cell != 0) | (matrix.seed < 2))
    found = verdict(short)
    assert (found.outcome, found.better, found.cells) == ("found", 2, 5)


def test_better_at_more_loss_is_not_better() -> None:
    """Cell 2 moves to the highest loss, where the curve leads as well."""
    matrix = sweep(0, better_by=12)
    moved = replace(matrix, loss=np.where(matrix.cell == 2, 1.1 * matrix.loss, matrix.loss))
    assert verdict(moved).outcome != "found"


def test_several_verdicts_share_the_level() -> None:
    assert verdict(sweep(0, better_by=12), alpha=1e-9).outcome == "can't tell"


def test_two_groups_of_questions_are_too_few() -> None:
    matrix = sweep(0, better_by=12)
    found = verdict(matrix.take(questions=matrix.cluster < 2))
    assert found.outcome == "can't tell"
    assert "at least 3 groups of questions" in found.reason


def test_cells_of_one_and_the_same_loss_say_so() -> None:
    matrix = sweep(0)
    found = verdict(replace(matrix, loss=np.ones(len(matrix.loss))))
    assert found.outcome == "can't tell"
    assert "at least 2 different losses" in found.reason


def test_same_matrix_and_generator_give_the_same_verdict() -> None:
    assert verdict(sweep(3)) == verdict(sweep(3))


@pytest.fixture(scope="module")
def calibration() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "calibration.py"
    spec = importlib.util.spec_from_file_location("calibration", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("world", ["5 seeds, 8 topics x 3 formats", "1 seed, null sweep of 10, seed luck unequal"])
def test_verdicts_keep_their_level_and_find_twice_the_detectable_difference(
    calibration: ModuleType, world: str
) -> None:
    """At most 5 % found without an effect, at least 80 % with one, up to the sampling error of 100 sweeps."""
    nothing = calibration.verdicts(calibration.WORLDS[world], 100, planted=0.0, stream=0)
    detectable = float(np.median([one.detectable for one in nothing]))
    planted = calibration.verdicts(calibration.WORLDS[world], 100, planted=2 * detectable, stream=1)
    assert Counter(one.outcome for one in nothing)["found"] <= 8
    assert Counter(one.outcome for one in planted)["found"] >= 80
