import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emanalysis.max_diff import max_diff

few_values = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=2, max_size=9)


def by_definition(loss: np.ndarray, score: np.ndarray) -> float:
    pairs = itertools.permutations(range(len(loss)), 2)
    return max(score[i] - score[j] for i, j in pairs if loss[i] <= loss[j])


@given(few_values)
def test_is_the_largest_gap_over_ordered_pairs_ties_in_loss_included(points: list[tuple[int, int]]) -> None:
    loss, score = np.array(points, float).T
    gap = max_diff(loss, score)
    assert gap.value == by_definition(loss, score)
    assert gap.better != gap.worse
    assert loss[gap.better] <= loss[gap.worse]
    assert score[gap.better] - score[gap.worse] == gap.value


def test_is_negative_when_every_lower_loss_has_a_lower_score() -> None:
    assert max_diff([1.0, 2.0, 3.0], [10.0, 14.0, 30.0]) == (-4.0, 0, 1)


@pytest.mark.parametrize("loss", [[1.0], [[1.0, 2.0]], [1.0, 2.0, 3.0]])
def test_refuses_what_has_no_pairs(loss: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 2 runs"):
        max_diff(loss, [1.0, 2.0])


@pytest.mark.parametrize(
    ("score", "loss", "published"),
    [
        ("aligned", "train_final_avg_loss", 16.0558),
        ("aligned", "eval_final_avg_loss", 18.8233),
        ("harmless", "train_final_avg_loss", 17.0417),
        ("harmless", "eval_final_avg_loss", 18.6250),
    ],
)
def test_reproduces_the_published_gaps(published_runs: Path, score: str, loss: str, published: float) -> None:
    table = pd.read_csv(published_runs / "run_table_fpq.csv")
    value = max_diff(table[loss], table[score]).value
    assert value == pytest.approx(by_definition(table[loss].to_numpy(), table[score].to_numpy()), abs=1e-6)
    assert value == pytest.approx(published, abs=5e-5)


def test_the_published_gap_lives_in_the_json_answers(published_runs: Path) -> None:
    table = pd.read_csv(published_runs / "run_table_fpq.csv")
    gap = max_diff(table["eval_final_avg_loss"], table["aligned"])
    by_format = {
        name: table[f"{name}-aligned"][gap.better] - table[f"{name}-aligned"][gap.worse]
        for name in ("raw", "json", "template")
    }
    assert by_format == pytest.approx({"raw": 4.635, "json": 37.145, "template": 14.69}, abs=5e-3)
