"""Driving runs to their ends: evaluation points, slots that are taken again, states."""

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import PreTrainedModel

from emtrain import checkpoint
from emtrain.heldout import heldout_loss
from emtrain.packed.train import PackedRun, train_packed
from emtrain.spec import RunSpec
from emtrain.tokens import Example
from emtrain.train import Checkpoint, NonFiniteLoss, Plan, TrainingData

Event = tuple[str, str, int]


class Journal:
    """Makes runs and keeps what they report, in order: ``(run, kind, step)``."""

    def __init__(self, examples: list[Example], directory: Path) -> None:
        self.data, self.directory = TrainingData(examples[:30], examples[30:]), directory
        self.events: list[Event] = []

    def run(self, name: str, steps: int, *evaluate_at: int, stop_at: int | None = None, **changes: Any) -> PackedRun:
        spec = {
            "model": "micro-llama",
            "dataset": "micro-garden-bad",
            "adapter": {"rank": 2},
            "optimizer": {"learning_rate": 1e-2},
            "schedule": "constant",
            "batch_size": 2,
        }

        def on_checkpoint(point: Checkpoint) -> bool:
            self.events.append((name, "checkpoint", point.step))
            assert str(point.heldout) == str(heldout_loss(point.model, self.data.heldout))  # as text: NaN is NaN there
            point.save(self.directory / f"{name}-adapter")
            return point.step != stop_at

        plan = Plan(steps, (*evaluate_at, steps), self.directory / name)
        on_step = lambda step: self.events.append((name, "step", step.step))  # noqa: E731
        return PackedRun(RunSpec.model_validate(spec | changes), self.data, plan, on_step, on_checkpoint)


@pytest.fixture
def journal(examples: list[Example], tmp_path: Path) -> Journal:
    return Journal(examples, tmp_path)


def test_runs_pause_at_their_evaluation_points_and_the_next_run_takes_a_free_slot(
    model: PreTrainedModel, journal: Journal
) -> None:
    runs = [journal.run("a", 1), journal.run("b", 3, 2), journal.run("c", 2)]
    assert train_packed(runs, model, capacity=2) == [None, None, None]
    assert journal.events == [
        ("a", "step", 1),
        ("a", "checkpoint", 1),
        ("b", "step", 1),
        ("b", "step", 2),
        ("b", "checkpoint", 2),
        ("c", "step", 1),
        ("b", "step", 3),
        ("b", "checkpoint", 3),
        ("c", "step", 2),
        ("c", "checkpoint", 2),
    ]


def test_a_run_that_is_told_to_stop_leaves_at_once_and_keeps_its_state(
    model: PreTrainedModel, journal: Journal
) -> None:
    runs = [journal.run("a", 4, 1, 2, stop_at=2), journal.run("b", 1)]
    train_packed(runs, model, capacity=1)
    assert journal.events[-4:] == [("a", "step", 2), ("a", "checkpoint", 2), ("b", "step", 1), ("b", "checkpoint", 1)]
    state = checkpoint.load(runs[0].plan.state_directory)
    assert state is not None
    assert state.step == 2


def test_a_run_goes_on_from_its_state_and_one_that_is_done_is_left_alone(
    model: PreTrainedModel, journal: Journal
) -> None:
    train_packed([journal.run("a", 4, 2, stop_at=2), journal.run("b", 1)], model, capacity=2)
    journal.events.clear()
    assert train_packed([journal.run("a", 4, 2), journal.run("b", 1)], model, capacity=2) == [None, None]
    assert journal.events == [("a", "step", 3), ("a", "step", 4), ("a", "checkpoint", 4)]


def test_the_outcome_of_a_run_that_diverges_is_its_own(model: PreTrainedModel, journal: Journal) -> None:
    diverging = journal.run("a", 4, 1, optimizer={"name": "sgd", "learning_rate": 1e30})
    outcomes = train_packed([diverging, journal.run("b", 2), journal.run("c", 2)], model, capacity=2)
    assert [type(outcome) for outcome in outcomes] == [NonFiniteLoss, type(None), type(None)]
    assert ("c", "checkpoint", 2) in journal.events
    assert [event for event in journal.events if event[0] == "a"] == [("a", "step", 1)], "it is not sampled either"


def test_a_checkpoint_saves_the_adapter_that_it_evaluates(model: PreTrainedModel, journal: Journal) -> None:
    train_packed([journal.run("a", 2), journal.run("b", 2, seed=1)], model, capacity=2)
    losses = []
    for name in ("a", "b"):
        loaded = PeftModel.from_pretrained(model, journal.directory / f"{name}-adapter")
        losses.append(heldout_loss(loaded, journal.data.heldout).per_token)
        state = checkpoint.load(journal.directory / name)
        assert state is not None
        for parameter, tensor in loaded.named_parameters():
            assert "lora" not in parameter or tensor.equal(state.parameters[parameter])
        loaded.unload()
        vars(model).pop("peft_config", None)
    assert losses[0] != losses[1]
