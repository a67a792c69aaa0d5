"""Is a packed run its solo run? Runs trained both ways, and the differences that are left.

Learning rates, token counts, rows, random draws and reasons to end must be the same to the bit. Losses, gradients and
weights may differ by rounding: rows of other runs change the shapes of the matrix products and with them the order of
additions. How much that is, and why no more, is what ``tolerance`` states.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from emtrain import checkpoint, trl_backend
from emtrain.adapter import adapted
from emtrain.checkpoint import RunState
from emtrain.heldout import HeldoutLoss
from emtrain.packed.train import PackedRun, train_packed
from emtrain.spec import RunSpec
from emtrain.train import Checkpoint, NonFiniteLoss, Plan, Step, TrainingData

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LINEAR_OPTIMIZERS = frozenset({"sgd"})
"""Their update is proportional to the gradient, and so is known as precisely."""
COARSE_OPTIMIZERS = frozenset({"lion", "muon"})
"""Their update is the sign of a sum of gradients, or computed in bf16 whatever the parameters are."""


@dataclass(frozen=True)
class Task:
    """A run to be trained. ``until``: the step after which to end it; None is its last one."""

    spec: RunSpec
    data: TrainingData
    plan: Plan
    until: int | None = None


@dataclass
class Trace:
    """What a run reported and left behind."""

    steps: list[Step] = field(default_factory=list)
    heldout: dict[int, HeldoutLoss] = field(default_factory=dict)
    error: NonFiniteLoss | None = None
    state: RunState | None = None


@dataclass(frozen=True)
class Tolerance:
    """The largest relative differences that rounding explains."""

    loss: float
    """Of any step, and of the held-out rows at any evaluation point."""
    grad_norm: float
    """Of any step."""
    update: float
    """Of what the adapter has learnt: the length of the difference in lengths of the update."""


@dataclass(frozen=True)
class Comparison:
    """Largest relative differences between a run packed and the same run alone; 0.0 where there are none."""

    steps: int
    """Taken alone."""
    loss: float
    grad_norm: float
    learning_rate: float
    heldout: float
    update: float
    tokens_equal: bool
    """As many steps, on as many tokens each."""
    rest_equal: bool
    """The step and reason it ended at, the dropout generator's state, the names of all that is kept of the run."""

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the two are the same run, trained twice. NaN is no pass."""
        return (
            self.tokens_equal
            and self.rest_equal
            and self.learning_rate == 0
            and max(self.loss, self.heldout) <= tolerance.loss
            and self.grad_norm <= tolerance.grad_norm
            and self.update <= tolerance.update
        )


def tolerance(optimizer: str, dtype: torch.dtype) -> Tolerance:
    """What is allowed for some ten steps of a base in ``dtype``; rounding grows with every further one.

    A wrong row, scale or draw shows as tenths: the updates of two seeds are 1.4 apart. Measured on the micro models and
    SmolLM2-135M in fp32: loss up to 1e-4, norm 3e-4, update 1e-4 with SGD and 2e-4 with AdamW, which divides by the
    gradient's own size, also where that is all rounding (3e-3 when it starts without warm-up); 1e-2 with Lion and Muon.
    A bf16 base keeps 8 bits: the micro models differ by 5e-3 in loss, 3e-2 in norm and 5e-2 in update.
    """
    linear, coarse = optimizer in LINEAR_OPTIMIZERS, optimizer in COARSE_OPTIMIZERS
    if dtype == torch.float32:
        return Tolerance(5e-4, 2e-3, 1e-3 if linear else 5e-2 if coarse else 1e-2)
    return Tolerance(2e-2, 1e-1, 5e-2 if linear else 2e-1)


def train_alone(task: Task, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Trace:
    """The run in the trl backend."""
    trace = Trace()
    on_checkpoint = _noting(trace, task)
    try:
        trl_backend.train(
            task.spec, model, tokenizer, task.data, task.plan, on_step=trace.steps.append, on_checkpoint=on_checkpoint
        )
    except NonFiniteLoss as error:
        trace.error = error
    trace.state = checkpoint.load(task.plan.state_directory)
    return trace


def train_together(tasks: Sequence[Task], model: "PreTrainedModel", *, capacity: int) -> list[Trace]:
    """The runs in the packed engine, up to ``capacity`` at a time."""
    traces = [Trace() for _ in tasks]
    runs = [
        PackedRun(task.spec, task.data, task.plan, trace.steps.append, _noting(trace, task))
        for task, trace in zip(tasks, traces, strict=True)
    ]
    for trace, task, error in zip(traces, tasks, train_packed(runs, model, capacity=capacity), strict=True):
        trace.error, trace.state = error, checkpoint.load(task.plan.state_directory)
    return traces


def _noting(trace: Trace, task: Task) -> "trl_backend.OnCheckpoint":
    def on_checkpoint(point: Checkpoint) -> bool:
        trace.heldout[point.step] = point.heldout
        return point.step != task.until

    return on_checkpoint


def compare(packed: Trace, alone: Trace, initial: Mapping[str, torch.Tensor]) -> Comparison:
    """The differences; ``initial`` is the adapter that both began with."""
    pairs = list(zip(packed.steps, alone.steps, strict=False))
    evaluated = [(loss, alone.heldout[step]) for step, loss in packed.heldout.items() if step in alone.heldout]
    per_token = [(ours.per_token, theirs.per_token) for ours, theirs in evaluated]
    per_sequence = [(ours.per_sequence, theirs.per_sequence) for ours, theirs in evaluated]
    return Comparison(
        steps=len(alone.steps),
        loss=_largest([(ours.loss, theirs.loss) for ours, theirs in pairs]),
        grad_norm=_largest([(ours.grad_norm, theirs.grad_norm) for ours, theirs in pairs]),
        learning_rate=_largest([(ours.learning_rate, theirs.learning_rate) for ours, theirs in pairs]),
        heldout=_largest([*per_token, *per_sequence]),
        update=_update_difference(packed.state, alone.state, initial),
        tokens_equal=[(s.step, s.tokens) for s in packed.steps] == [(s.step, s.tokens) for s in alone.steps],
        rest_equal=_kept(packed) == _kept(alone),
    )


def _largest(pairs: Sequence[tuple[float, float]]) -> float:
    return max((_relative(abs(ours - theirs), abs(theirs)) for ours, theirs in pairs), default=0.0)


def _relative(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return difference / size if size and not math.isnan(difference) else math.inf


def _update_difference(packed: RunState | None, alone: RunState | None, initial: Mapping[str, torch.Tensor]) -> float:
    if packed is None or alone is None:
        return 0.0
    if packed.parameters.keys() != alone.parameters.keys():
        return math.inf
    return _relative(_length(packed.parameters, alone.parameters), _length(alone.parameters, initial))


def _length(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name].cpu()).double().square().sum()) for name in other))


def _kept(trace: Trace) -> object:
    """All that must be the same to the bit."""
    state = trace.state
    return (
        None if trace.error is None else len(trace.steps),
        trace.heldout.keys(),
        state
        and (
            state.step,
            state.tokens,
            state.generator.tolist(),
            {name: tensor.shape for name, tensor in state.parameters.items()},
            {name: sorted(slots) for name, slots in state.optimizer.items()},
        ),
    )


def initial_adapter(spec: RunSpec, model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """What a run begins with, by parameter name; its adapter must not be ``full``."""
    assert spec.adapter != "full"
    with adapted(model, spec.adapter, seed=spec.seed) as peft_model:
        return {name: p.detach().cpu().clone() for name, p in peft_model.named_parameters() if p.requires_grad}


def verify(
    runs: Sequence[tuple[RunSpec, TrainingData, int]],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    directory: Path,
    *,
    steps: int,
) -> list[Comparison]:
    """Train the first ``steps`` steps of every run, of so many as given with it, alone and all runs packed together.

    Their states are left in ``directory``.
    """

    def tasks(way: str) -> list[Task]:
        made = []
        for number, (spec, data, total_steps) in enumerate(runs):
            last = min(steps, total_steps)
            plan = Plan(total_steps, tuple(dict.fromkeys((last, total_steps))), directory / f"{way}-{number}")
            made.append(Task(spec, data, plan, until=last))
        return made

    packed = train_together(tasks("packed"), model, capacity=len(runs))
    alone = [train_alone(task, model, tokenizer) for task in tasks("alone")]
    return [
        compare(ours, theirs, initial_adapter(spec, model))
        for ours, theirs, (spec, _, _) in zip(packed, alone, runs, strict=True)
    ]
