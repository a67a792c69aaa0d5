from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from emanalysis.comparable import comparable
from emanalysis.power import Design, Noise, detectable_difference, estimate_noise
from emanalysis.power_table import measured_noise, smallest_change, ways_table
from emanalysis.records import Records

NOISE = Noise(seed=2.0, interaction=4.0, seed_question=3.0, response=20.0)


def test_the_table_begins_with_the_design_as_it_is_and_each_way_reaches_the_difference() -> None:
    design = Design(6, 3, 8, 3, 10)
    now, *ways = ways_table(NOISE, design, 5.0)
    assert now == {"change": "now", "seeds": 3, "questions": 24, "topics": 8, "samples": 10} | {
        "responses": 6 * 3 * 24 * 10,
        "detects": pytest.approx(detectable_difference(NOISE, design)),
    }
    assert now["detects"] > 5
    assert ways
    assert all(row["detects"] <= 5 for row in ways)
    assert [row["responses"] for row in ways] == sorted(row["responses"] for row in ways)


def test_the_smallest_change_names_what_has_to_grow_and_from_what() -> None:
    rows = [
        {"change": "now", "seeds": 3, "questions": 24, "topics": 8, "samples": 8.0, "detects": 12.0},
        {"change": "fewest responses", "seeds": 6, "questions": 48, "topics": 16, "samples": 8.0, "detects": 4},
    ]
    assert smallest_change(rows, 5) == (
        "The smallest change that finds 5 points: 6 seeds of each configuration (now 3), 48 questions (now 24), "
        "16 topics (now 8)."
    )
    assert smallest_change(rows, 12) == "As it is, the recipe finds 12 points."
    assert smallest_change(rows[:1], 5).startswith("Even 64 seeds of each configuration and 64 times the questions")


def test_one_seed_detects_nothing_and_is_told_how_many_it_takes() -> None:
    now, *ways = ways_table(NOISE, Design(2, 1, 16), 8.0)
    assert now["detects"] is None
    assert "seeds of each configuration (now 1)" in smallest_change([now, *ways], 8.0)


def test_noise_is_that_of_the_group_most_like_the_sweep_to_come(sweep_of: Callable[..., Records]) -> None:
    def score(run: dict[str, Any], question: str) -> float:
        return 50.0 + 7 * int(run["seed"]) % 5 + len(question)

    records = sweep_of(score)
    quieter = records.questions.assign(question_set="other", aligned=lambda rows: 50 + rows["aligned"] / 10)
    both = replace(records, questions=pd.concat([records.questions, quieter], ignore_index=True))
    groups = comparable(both)
    for asked in ("broad", "other"):
        noise, which = measured_noise(groups, model="unknown", dataset="garden-bad", question_set=asked)
        (expected,) = (group for group in groups if group.question_set == asked)
        assert noise == estimate_noise(expected.matrix)
        assert which == f"micro-llama on garden-bad, asked {asked}"
