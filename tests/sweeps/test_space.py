"""The space of a search: what is drawn from it, and which runs lie in it."""

import warnings
from collections.abc import Mapping
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sweeps.space import Range, corners, draw, labels, locate

SPACE: dict[str, Any] = {
    "optimizer.learning_rate": Range(low=1e-5, high=1e-2, log=True),
    "adapter.rank": Range(low=2, high=16, integer=True),
    "schedule": (
        "linear",
        {"name": "cosine_restarts", "cycles": {"low": 2, "high": 5, "integer": True}},
        {"name": "wsd", "decay_fraction": 0.2},
    ),
    "optimizer.betas": ([0.9, 0.99], [0.8, 0.9]),
}


def found(changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Where ``changes`` lie in the space, when a choice is the same run only as it is written."""
    return locate(SPACE, changes, lambda key, value: bool(changes[key] == value))


def drawn(seed: int, space: Mapping[str, Any] = SPACE) -> tuple[dict[str, Any], optuna.trial.FrozenTrial]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    changes = draw(space, trial)
    return changes, study.trials[0]


@given(st.integers(0, 10_000))
def test_what_is_drawn_lies_in_the_space(seed: int) -> None:
    changes, _ = drawn(seed)
    assert 1e-5 <= changes["optimizer.learning_rate"] <= 1e-2
    assert changes["adapter.rank"] in range(2, 17)
    assert changes["optimizer.betas"] in ([0.9, 0.99], [0.8, 0.9])
    schedule = changes["schedule"]
    assert (
        schedule == "linear"
        or schedule == {"name": "wsd", "decay_fraction": 0.2}
        or (schedule["name"] == "cosine_restarts" and schedule["cycles"] in range(2, 6))
    )


def test_a_range_inside_a_choice_exists_only_when_it_is_chosen() -> None:
    for seed in range(20):
        changes, trial = drawn(seed)
        inside = [name for name in trial.params if "cycles" in name]
        chosen = isinstance(changes["schedule"], dict) and changes["schedule"]["name"] == "cosine_restarts"
        assert inside == (["schedule.cosine_restarts.cycles"] if chosen else [])


@given(st.integers(0, 10_000))
def test_what_was_drawn_is_found_again_with_the_same_parameters(seed: int) -> None:
    changes, trial = drawn(seed)
    located = found(changes)
    assert located is not None
    parameters, distributions = located
    assert parameters == trial.params
    assert distributions == trial.distributions


@pytest.mark.parametrize(
    "outside",
    [
        {"optimizer.learning_rate": 0.5},
        {"adapter.rank": 17},
        {"adapter.rank": 2.5},
        {"schedule": "cosine"},
        {"schedule": {"name": "cosine_restarts", "cycles": 6}},
        {"schedule": {"name": "wsd", "decay_fraction": 0.3}},
        {"schedule": {"name": "wsd", "decay_fraction": 0.2, "warmup_steps": 5}},
        {"schedule": {"name": "cosine_restarts", "cycles": 3, "warmup_steps": 5}},
        {"optimizer.betas": [0.9, 0.9]},
    ],
)
def test_what_lies_outside_is_not_found(outside: dict[str, Any]) -> None:
    inside = {"optimizer.learning_rate": 1e-3, "adapter.rank": 4, "schedule": "linear", "optimizer.betas": [0.9, 0.99]}
    assert found(inside) is not None
    assert found({**inside, **outside}) is None


def test_the_ends_of_everything_are_tried_before_a_search() -> None:
    assert corners(SPACE["adapter.rank"]) == [2, 16]
    assert corners(SPACE["schedule"]) == [
        "linear",
        {"name": "cosine_restarts", "cycles": 2},
        {"name": "cosine_restarts", "cycles": 5},
        {"name": "wsd", "decay_fraction": 0.2},
    ]


def test_choices_of_one_name_are_told_apart() -> None:
    twice = ({"name": "wsd", "decay_fraction": 0.1}, {"name": "wsd", "decay_fraction": 0.2}, "linear", 3, None)
    assert labels(twice) == ["wsd#0", "wsd#1", "linear", 3, None]


def test_every_label_is_one_that_optuna_stores() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(0)
    assert all(
        isinstance(label, str | int | float | None)
        for entry in ("schedule", "optimizer.betas")
        for label in labels(SPACE[entry])
    )


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"low": 2, "high": 1}, "low must be smaller"),
        ({"low": 1, "high": 1}, "low must be smaller"),
        ({"low": 0, "high": 1, "log": True}, "must be above 0"),
        ({"low": 0.5, "high": 2, "integer": True}, "needs whole numbers"),
        ({"low": 0, "hihg": 1}, "hihg"),
    ],
)
def test_ranges_that_are_none_are_refused(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Range.model_validate(entry)
