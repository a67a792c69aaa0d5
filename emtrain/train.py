"""The story of one run: what a backend is given, what it reports, and what is left at the end."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emtrain.heldout import HeldoutLoss
from emtrain.tokens import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Step:
    """One finished optimiser step."""

    step: int
    """From 1: updates done, this one included."""
    loss: float
    """Mean over the response tokens of the step's rows, before the update, in nats."""
    learning_rate: float
    """As used by this update."""
    grad_norm: float
    """Global L2 norm before clipping."""
    tokens: int
    """Trained on since the beginning of the run, prompts included, padding not."""


@dataclass(frozen=True)
class Checkpoint:
    """A run that pauses to be evaluated after ``step`` updates."""

    step: int
    heldout: HeldoutLoss
    model: "PreTrainedModel"
    """The model as trained so far, in evaluation mode; to be used only while the run pauses."""
    save: Callable[[Path], None]
    """Writes what was trained into a directory: a PEFT adapter, or the whole model where every weight is trained."""


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and is measured on, as tokens."""

    train: Sequence[Example]
    heldout: Sequence[Example]


OnStep = Callable[[Step], None]
OnCheckpoint = Callable[[Checkpoint], bool]
"""Called at every evaluation point; False ends the run there."""


class NonFiniteLoss(RuntimeError):
    """The loss or gradient of a step is NaN or infinite. Raised before the update, so the parameters are intact.

    ``grad_norm`` None: it is the held-out loss after ``step``, whose update broke the parameters.
    """

    def __init__(self, step: int, learning_rate: float, loss: float, grad_norm: float | None) -> None:
        if grad_norm is None:
            what, ending = f"the held-out loss is {loss} after step", "its update broke the parameters"
        else:
            what, ending = f"the loss is {loss} and the gradient norm {grad_norm} at step", "the update was not made"
        super().__init__(f"{what} {step} (learning rate {learning_rate:.3g}); {ending}")


def checked(heldout: HeldoutLoss, step: int, learning_rate: float) -> HeldoutLoss:
    """The loss after ``step``, made with ``learning_rate``. Raises ``NonFiniteLoss``: such a model can't be sampled."""
    if not math.isfinite(heldout.per_token):
        raise NonFiniteLoss(step, learning_rate, heldout.per_token, None)
    return heldout


def evaluation_steps(total_steps: int, fractions: Sequence[float]) -> tuple[int, ...]:
    """The steps after which a run is evaluated: each fraction of ``total_steps`` rounded up, the last step always."""
    # The small term keeps 0.3 * 10 = 3.0000000000000004 from becoming 4.
    return tuple(sorted({math.ceil(fraction * total_steps - 1e-9) for fraction in fractions} | {total_steps}))


@dataclass(frozen=True)
class Plan:
    """When a run is evaluated and where its state is kept."""

    total_steps: int
    evaluate_at: Sequence[int]
    """Steps, ascending; the last is ``total_steps``."""
    state_directory: Path
    """Holds the run's newest state, written at every evaluation point; a run begins from what it finds there."""
