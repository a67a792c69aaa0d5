"""Successive halving: which runs go on, and that they wait for each other."""

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeps.halving import Halving, best, rung_steps
from sweeps.planner import plan_sweep
from sweeps.recipe import load_recipe

VALUES = st.dictionaries(st.text("abcdef", min_size=1), st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1)


@given(VALUES, st.integers(2, 5), st.sampled_from(["minimize", "maximize"]))
def test_the_best_share_goes_on_and_none_that_is_worse(
    values: dict[str, float], reduction: int, direction: Any
) -> None:
    on = best(values, reduction=reduction, direction=direction)
    assert len(on) == max(1, len(values) // reduction)
    for key in on:
        for other in values.keys() - on:
            better = values[key] < values[other] if direction == "minimize" else values[key] > values[other]
            assert better or (values[key] == values[other] and key < other)


def test_a_run_stands_at_a_rung_at_its_first_evaluation_point_from_there() -> None:
    """Rungs of 100 steps at 10, 30 and 90."""
    assert rung_steps([10, 20, 50, 100], longest=100, grace=0.1, reduction=3) == (10, 50, None)
    assert rung_steps([95, 100], longest=100, grace=0.1, reduction=3) == (None, None, 95)
    assert rung_steps([12, 25], longest=100, grace=0.1, reduction=3) == (12, None, None)  # the shorter run ends at 25


def halving(runs: str, *, known: dict[str, dict[int, float]] | None = None, over: str = "") -> Halving:
    """Rungs at steps 1 and 3; of three one goes on, of the smallest values."""
    steps = dict.fromkeys(runs, (1, 3))
    return Halving(steps, metric="m", reduction=3, direction="minimize", known=known or {}, over=over)


def test_runs_wait_until_all_have_come_and_only_the_best_goes_on() -> None:
    rung = halving("abc")
    said: dict[str, bool] = {}

    def ask(run_key: str) -> None:
        said[run_key] = rung.may_go_on(run_key)

    threads = [threading.Thread(target=ask, args=run_key, daemon=True) for run_key in "ab"]
    rung.came("a", 1, 0.5)
    rung.came("b", 1, 0.1)
    for thread in threads:
        thread.start()
    threads[0].join(0.2)
    assert said == {}
    rung.came("c", 1, 0.9)
    for thread in threads:
        thread.join(5)
    assert said == {"a": False, "b": True}
    assert not rung.may_go_on("c")


def test_a_run_that_failed_is_waited_for_no_more() -> None:
    rung = halving("abc")
    rung.came("a", 1, 0.5)
    rung.came("b", 1, 0.1)
    rung.left("c")
    assert (rung.may_go_on("a"), rung.may_go_on("b")) == (False, True)


def test_a_run_without_a_value_goes_on() -> None:
    rung = halving("abcd")
    rung.came("a", 1, None)
    for key, value in [("b", 0.3), ("c", 0.2), ("d", 0.1)]:
        rung.came(key, 1, value)
    assert [key for key in "abcd" if rung.may_go_on(key)] == ["a", "d"]


def test_what_is_known_from_before_decides_as_it_did() -> None:
    """At the first rung a and b go on of six, and a is the better at the second."""
    first = {key: {1: float(place)} for place, key in enumerate("abcdef")}
    known = first | {"a": {1: 0.0, 3: 0.1}, "b": {1: 1.0, 3: 0.2}}
    rung = halving("abcdef", known=known, over="def")
    assert [rung.may_go_on(key) for key in "abc"] == [True, False, False]


def test_those_that_ended_at_a_rung_count_there_when_the_sweep_is_started_again() -> None:
    """Of nine runs a, b and c go on, which come first among what is known, as they did when all were there."""
    known = {key: {1: float(place)} for place, key in enumerate("abcdefghi")}
    rung = halving("abcdefghi", known=known, over="defghi")
    assert [key for key in "abc" if rung.may_go_on(key)] == ["a", "b", "c"]


RECIPE = """
name: tiny
base: {model: micro-llama, dataset: micro-garden-bad, max_steps: 12}
grid: {seed: [0, 1, 2]}
stopping: {rule: halving, metric: heldout/loss, direction: minimize}
eval: {questions: [micro-narrow], at: [0.25, 1.0], samples: 1, judges: [micro-rule], max_new_tokens: 8}
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stopping.by=tokens", "halving has its rungs at steps"),
        ("resources.backend=trl", "keeps the device while it waits"),
        ("search={trials: 3, space: {batch_size: [2, 4]}, objectives: {heldout/loss: minimize}}", "a search proposes"),
        ("grid={model: [micro-llama, micro-qwen2]}", "halving all runs share one model"),
        ("base.adapter=full", "use a LoRA adapter"),
    ],
)
def test_what_can_not_wait_is_refused_with_a_way_out(change: str, message: str) -> None:
    plan_sweep(load_recipe(RECIPE, source="tiny.yaml"))
    with pytest.raises(ValueError, match=message):
        plan_sweep(load_recipe(RECIPE, source="tiny.yaml", overrides=[change]))
