"""How many runs are packed: where the curve goes flat, what memory allows, and what is measured only once."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from emtrain.packed import costs, gain
from emtrain.packed.gain import packing
from emtrain.spec import RunSpec
from emtrain.tokens import Example
from emtrain.train import TrainingData

Measure = Callable[[dict[int, float | list[float]]], list[int]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMSWEEP_CACHE", str(tmp_path))


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Puts given milliseconds by runs in the place of measurements; returns the list of what was asked for.

    Of several, each measurement gets the next.
    """

    def put(milliseconds: dict[int, float | list[float]]) -> list[int]:
        asked: list[int] = []

        def measured(model: object, spec: object, data: object, runs: int) -> object:
            asked.append(runs)
            if runs not in milliseconds:
                raise torch.OutOfMemoryError
            given = milliseconds[runs]
            return gain._Point((given.pop(0) if isinstance(given, list) else given) / 1e3, 1000)

        monkeypatch.setattr(gain, "_measure", measured)
        return asked

    return put


@pytest.fixture
def data(examples: list[Example]) -> TrainingData:
    return TrainingData(examples[:30], examples[30:])


def make_spec(batch_size: int = 2) -> RunSpec:
    content = {"model": "micro-llama", "dataset": "micro-garden-bad", "adapter": {"rank": 4}, "batch_size": batch_size}
    return RunSpec.model_validate(content)


FALLING: dict[int, float | list[float]] = {1: 16.0, 2: 9.0, 4: 5.0, 8: 3.0, 16: 2.0, 32: 1.5}


def test_the_number_is_doubled_until_the_curve_is_flat(
    model: PreTrainedModel, data: TrainingData, measure: Measure
) -> None:
    """Eight runs gain 6 % over two: of those within 10 % of the fastest the fewest are taken."""
    asked = measure({1: 16, 2: 9, 4: 8.2, 8: 8.5, 16: 3})
    found = packing(model, make_spec(), data, most=32)
    assert (found.runs, asked) == (2, [1, 2, 4, 8, 8])
    assert found.seconds == pytest.approx({1: 0.016, 2: 0.009, 4: 0.0082, 8: 0.0085})
    assert str(found) == (
        "2 runs are packed; more gain less than 10 % (ms of a run's step, by runs packed: 1: 16, 2: 9, 4: 8.2, 8: 8.5)"
    )


def test_one_point_that_came_out_badly_does_not_end_the_curve(
    model: PreTrainedModel, data: TrainingData, measure: Measure
) -> None:
    measure({**FALLING, 4: 9.0})
    assert packing(model, make_spec(), data, most=8).runs == 8


def test_a_point_that_ends_the_curve_is_measured_again_and_the_faster_counts(
    model: PreTrainedModel, data: TrainingData, measure: Measure
) -> None:
    """Other work slowed the machine down while two and four runs were measured."""
    asked = measure({1: 16, 2: 17, 4: [17, 11], 8: 7, 16: [7, 6.9]})
    found = packing(model, make_spec(), data, most=16)
    assert asked == [1, 2, 4, 4, 8, 16]
    assert found.seconds == pytest.approx({1: 0.016, 2: 0.017, 4: 0.011, 8: 0.007, 16: 0.007})
    assert found.runs == 8
    assert packing(model, make_spec(), data, most=16) == found
    assert len(asked) == 6, "the faster one is kept"


def test_a_model_that_gains_nothing_trains_one_run_at_a_time(
    model: PreTrainedModel, data: TrainingData, measure: Measure
) -> None:
    measure({1: 16, 2: 15.9, 4: 15})
    assert packing(model, make_spec(), data, most=32).runs == 1


def test_nothing_is_measured_where_a_step_fills_the_device(
    model: PreTrainedModel, data: TrainingData, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "HOST_FLOP", {"cpu": 1e4, "cuda": 1e4})
    asked = measure(FALLING)
    found = packing(model, make_spec(), data, most=32)
    assert (found.runs, found.seconds, asked) == (1, {}, [])
    assert "fills the device" in found.reason


@pytest.mark.parametrize("most", [1, 4, 6])
def test_no_more_runs_are_packed_than_are_wanted(
    model: PreTrainedModel, data: TrainingData, measure: Measure, most: int
) -> None:
    measure(FALLING)
    assert packing(model, make_spec(), data, most=most).runs == most


def test_running_out_of_memory_ends_the_curve(model: PreTrainedModel, data: TrainingData, measure: Measure) -> None:
    measure({1: 16, 2: 9, 4: 5})
    found = packing(model, make_spec(), data, most=32)
    assert (found.runs, found.reason) == (4, "8 run out of memory")


def test_no_more_runs_are_tried_than_half_of_the_memory_holds(
    model: PreTrainedModel, data: TrainingData, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run takes 1000 bytes."""
    asked = measure(FALLING)
    monkeypatch.setattr(costs, "free_bytes", lambda device: 13_000)
    found = packing(model, make_spec(), data, most=32)
    assert (found.runs, found.reason, asked) == (6, "memory is enough for no more", [1, 2, 4])


def test_what_was_measured_is_kept_for_the_same_shape(
    model: PreTrainedModel, data: TrainingData, measure: Measure
) -> None:
    asked = measure(FALLING)
    packing(model, make_spec(), data, most=4)
    assert packing(model, make_spec().model_copy(update={"seed": 5}), data, most=8).runs == 8
    assert asked == [1, 2, 4, 8]
    packing(model, make_spec(batch_size=3), data, most=2)
    assert asked == [1, 2, 4, 8, 1, 2]


def test_a_measurement_leaves_the_model_as_it_was(model: PreTrainedModel, data: TrainingData) -> None:
    """Also of runs that are shorter than the measurement."""
    modules = dict(model.named_modules())
    found = packing(model, make_spec().model_copy(update={"max_steps": 1}), data, most=2)
    assert found.seconds.keys() == {1, 2}
    assert all(0 < seconds < 1 for seconds in found.seconds.values())
    assert dict(model.named_modules()) == modules


def test_memory_is_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs.psutil, "virtual_memory", lambda: SimpleNamespace(available=900))
    monkeypatch.setattr(costs.os, "cpu_count", lambda: 3)
    assert costs.free_bytes(torch.device("cpu")) == 300
