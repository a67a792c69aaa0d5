"""Trains runs to their ends on one engine: whenever a run leaves, the next takes its slot."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emtrain import checkpoint
from emtrain.heldout import heldout_loss
from emtrain.packed.batch import Frame
from emtrain.packed.engine import Engine
from emtrain.packed.export import save_adapter
from emtrain.packed.run import Run
from emtrain.spec import RunSpec
from emtrain.train import Checkpoint, NonFiniteLoss, OnCheckpoint, OnStep, Plan, TrainingData, checked

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PackedRun:
    """What ``emtrain.trl_backend.train`` takes for one run, the model aside."""

    spec: RunSpec
    data: TrainingData
    plan: Plan
    on_step: OnStep
    on_checkpoint: OnCheckpoint


def train_packed(
    runs: Iterable[PackedRun], model: "PreTrainedModel", *, capacity: int, frame: Frame | None = None
) -> list[NonFiniteLoss | None]:
    """Train all ``runs``, up to ``capacity`` at a time, each as ``emtrain.trl_backend.train`` would.

    Every run goes on from the state that it left behind, if there is one. ``model`` is itself again at the end.
    Returns for each run, in their order, why it ended early, or None. ``frame`` is that of ``Engine``.
    """
    waiting = iter(runs)
    training: dict[Run, tuple[int, PackedRun]] = {}
    outcomes: list[NonFiniteLoss | None] = []
    with Engine(model, capacity=capacity, frame=frame) as engine:
        while True:
            while len(training) < capacity and (given := next(waiting, None)) is not None:
                state = checkpoint.load(given.plan.state_directory)
                if state is None or state.step < given.plan.total_steps:
                    run = engine.join(given.spec, given.data, total_steps=given.plan.total_steps, state=state)
                    training[run] = len(outcomes), given
                outcomes.append(None)
            if not training:
                return outcomes
            for run, outcome in engine.step().items():
                number, given = training[run]
                if isinstance(outcome, NonFiniteLoss):
                    outcomes[number] = outcome
                    del training[run]
                    continue
                given.on_step(outcome)
                try:
                    go_on = run.step not in given.plan.evaluate_at or _evaluate(engine, run, given)
                except NonFiniteLoss as error:
                    outcomes[number], go_on = error, False
                if not go_on or run.step == given.plan.total_steps:
                    engine.leave(run)
                    del training[run]


def _evaluate(engine: Engine, run: Run, given: PackedRun) -> bool:
    """Pause the run to be evaluated and keep its state; False ends it. Raises ``NonFiniteLoss``."""

    def save(directory: Path) -> None:
        save_adapter(run, directory, base=engine.model.name_or_path)

    with engine.acting_as(run) as model:
        loss = checked(heldout_loss(model, given.data.heldout), run.step, run.learning_rate)
        go_on = given.on_checkpoint(Checkpoint(run.step, loss, model, save))
    # Saved after the evaluation is on record: a run killed in between evaluates once more, it never skips one.
    checkpoint.save(run.state(), given.plan.state_directory)
    return go_on
