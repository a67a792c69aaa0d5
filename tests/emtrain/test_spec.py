"""Claims about run specifications."""

import math

import pytest
from pydantic import ValidationError

from emtrain.spec import AdapterSpec, OptimizerSpec, RunSpec, ScheduleSpec, flatten


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert OptimizerSpec.model_validate({"learning_rate": "3e-4"}).learning_rate == 3e-4


@pytest.mark.parametrize("learning_rate", [0, -1e-3, math.nan, math.inf, "fast"])
def test_learning_rates_that_train_nothing_are_refused(learning_rate: object) -> None:
    with pytest.raises(ValidationError):
        OptimizerSpec.model_validate({"learning_rate": learning_rate})


def test_a_bare_name_is_a_part_without_arguments() -> None:
    assert ScheduleSpec.model_validate("cosine") == ScheduleSpec(name="cosine")


def test_arguments_of_a_part_are_checked_against_its_function() -> None:
    assert ScheduleSpec.model_validate({"name": "cosine_restarts", "cycles": 4}).arguments == {"cycles": 4}
    with pytest.raises(ValidationError, match="does not take cycls; it takes: cycles"):
        ScheduleSpec.model_validate({"name": "cosine_restarts", "cycls": 4})
    with pytest.raises(ValidationError, match="Did you mean 'cosine'"):
        ScheduleSpec(name="cosin")


def test_values_of_a_parts_arguments_are_checked_too() -> None:
    with pytest.raises(ValidationError):
        ScheduleSpec.model_validate({"name": "cosine_restarts", "cycles": 0})


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="rnak"):
        AdapterSpec.model_validate({"rnak": 4})


@pytest.mark.parametrize(
    ("changes", "rows", "steps"),
    [
        ({"batch_size": 16}, 5310, 332),  # 5310 / 16 = 331.9: the published runs' 332 steps
        ({"batch_size": 8, "epochs": 2}, 20, 5),
        ({"batch_size": 8, "epochs": 0.1}, 8, 1),
        ({"max_steps": 7}, 10_000, 7),
    ],
)
def test_steps_of_a_run(changes: dict[str, object], rows: int, steps: int) -> None:
    spec = RunSpec.model_validate({"model": "micro-llama", "dataset": "d.jsonl", **changes})
    assert spec.total_steps(rows) == steps


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValidationError, match="epochs and max_steps are both given"):
        RunSpec.model_validate({"model": "micro-llama", "dataset": "d.jsonl", "epochs": 1, "max_steps": 3})
    with pytest.raises(ValidationError, match="micro_batch_size 3 does not divide batch_size 8"):
        RunSpec.model_validate({"model": "micro-llama", "dataset": "d.jsonl", "batch_size": 8, "micro_batch_size": 3})


def test_params_are_all_leaves_under_the_names_of_the_tracking_schema() -> None:
    spec = RunSpec.model_validate(
        {
            "model": "micro-llama",
            "dataset": "d.jsonl",
            "schedule": {"name": "cosine_restarts", "warmup_steps": 3, "cycles": 4},
        }
    )
    params = flatten(spec)
    assert params["schedule"] == "cosine_restarts"
    assert params["schedule.cycles"] == 4
    assert params["warmup_steps"] == 3
    assert params["optimizer"] == "adamw"
    assert params["learning_rate"] == 1e-5
    assert params["adapter.rank"] == 32
    assert params["seed"] == 0
    assert flatten(spec.model_copy(update={"adapter": "full"}))["adapter"] == "full"
