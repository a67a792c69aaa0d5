"""A packed run is its solo run: every step and the adapter at the end, against the trl backend.

Tolerances, in fp32 on a CPU: losses within 1e-5 of themselves, gradient norms within 2e-4, the trained change of the
adapter within 1e-3 of its length; learning rates, token counts and the dropout generator exactly. What differs is the
order of additions: rows of other runs change the shapes of the matrix products. Two things magnify that, and then
adapters are held to 1e-2: Muon orthogonalises in bf16, and the first updates of AdamW are signs of the gradient, also
where it is all rounding, of which there is more in SmolLM2's 30 layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from emtrain import checkpoint, trl_backend
from emtrain.adapter import adapted
from emtrain.checkpoint import RunState
from emtrain.heldout import HeldoutLoss
from emtrain.packed.train import PackedRun, train_packed
from emtrain.rows import Row, load_dataset
from emtrain.spec import RunSpec
from emtrain.tokens import Example, encode_rows
from emtrain.train import Checkpoint, NonFiniteLoss, Plan, Step, TrainingData

Changes = dict[str, Any]

MUON = 1e-2
"""Tolerance of adapters that Muon trains."""

DIVERGING: Changes = {
    "optimizer": {"name": "sgd", "learning_rate": 1e30},
    "schedule": {"name": "constant", "warmup_steps": 0},
}
# Unequal in everything that may differ between runs of one pack; they last for 8, 5, 3, 6, 4, 7 and 2 steps.
RUNS: list[tuple[int, Changes]] = [
    (8, {}),
    (
        5,
        {
            "adapter": {"rank": 3, "alpha": 5, "rslora": False, "target_modules": ["q_proj", "down_proj"]},
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.05,
                "momentum": 0.9,
                "nesterov": True,
                "max_grad_norm": 0.3,
            },
            "schedule": {"name": "cosine", "warmup_steps": 1},
            "batch_size": 6,
            "micro_batch_size": 2,
            "seed": 1,
        },
    ),
    (
        3,
        {
            "adapter": {"rank": 2, "alpha": 4, "dropout": 0.25},
            "optimizer": {"name": "adamw", "learning_rate": 3e-3, "betas": [0.8, 0.9], "max_grad_norm": None},
            "schedule": {"name": "constant", "warmup_steps": 0},
            "batch_size": 4,
            "micro_batch_size": 2,
            "seed": 2,
        },
    ),
    (
        6,
        {
            "adapter": {"rank": 5, "alpha": 2, "dropout": 0.1, "target_modules": ["v_proj"]},
            "optimizer": {"name": "lion", "learning_rate": 1e-3, "weight_decay": 0.3, "max_grad_norm": 0.3},
            "batch_size": 1,
            "seed": 3,
        },
    ),
    (4, DIVERGING),
    (
        7,
        {
            "adapter": {"rank": 1, "alpha": 8},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3, "eps": 1e-4, "weight_decay": 0.5},
            "batch_size": 10,
            "micro_batch_size": 5,
            "seed": 5,
        },
    ),
    (2, {"optimizer": {"name": "muon", "learning_rate": 1e-3}, "batch_size": 3, "seed": 6}),
]


def make_spec(changes: Changes) -> RunSpec:
    return RunSpec.model_validate(
        {
            "model": "micro-llama",
            "dataset": "micro-garden-bad",
            "adapter": {"rank": 4, "alpha": 8},
            "optimizer": {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1},
            "schedule": {"name": "linear", "warmup_steps": 1},
            "batch_size": 4,
            **changes,
        }
    )


@dataclass
class Record:
    """What a run reported and left behind."""

    steps: list[Step] = field(default_factory=list)
    heldout: dict[int, HeldoutLoss] = field(default_factory=dict)
    error: NonFiniteLoss | None = None
    state: RunState | None = None

    def on_checkpoint(self, point: Checkpoint, stop_at: int | None = None) -> bool:
        self.heldout[point.step] = point.heldout
        return point.step != stop_at


def train_alone(
    spec: RunSpec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    plan: Plan,
    stop_at: int | None = None,
) -> Record:
    record = Record()
    try:
        trl_backend.train(
            spec,
            model,
            tokenizer,
            data,
            plan,
            on_step=record.steps.append,
            on_checkpoint=partial(record.on_checkpoint, stop_at=stop_at),
        )
    except NonFiniteLoss as error:
        record.error = error
    record.state = checkpoint.load(plan.state_directory)
    return record


def train_together(
    runs: Sequence[tuple[RunSpec, TrainingData, Plan]],
    model: PreTrainedModel,
    capacity: int,
    stop_at: int | None = None,
) -> list[Record]:
    records = [Record() for _ in runs]
    given = [
        PackedRun(
            spec, data, plan, record.steps.append, lambda point, record=record: record.on_checkpoint(point, stop_at)
        )
        for (spec, data, plan), record in zip(runs, records, strict=True)
    ]
    errors = train_packed(given, model, capacity=capacity)
    for record, error, (_, _, plan) in zip(records, errors, runs, strict=True):
        record.error, record.state = error, checkpoint.load(plan.state_directory)
    return records


def assert_same(packed: Record, alone: Record, initial: dict[str, torch.Tensor], *, tolerance: float) -> None:
    assert [(s.step, s.learning_rate, s.tokens) for s in packed.steps] == [
        (s.step, s.learning_rate, s.tokens) for s in alone.steps
    ]
    assert [s.loss for s in packed.steps] == pytest.approx([s.loss for s in alone.steps], rel=1e-5)
    assert [s.grad_norm for s in packed.steps] == pytest.approx([s.grad_norm for s in alone.steps], rel=2e-4)
    assert packed.heldout.keys() == alone.heldout.keys()
    for step, loss in packed.heldout.items():
        assert loss.per_token == pytest.approx(alone.heldout[step].per_token, rel=1e-5)
        assert loss.per_sequence == pytest.approx(alone.heldout[step].per_sequence, rel=1e-5)
    if packed.state is None or alone.state is None:
        assert packed.state is alone.state is None
        return
    assert (packed.state.step, packed.state.tokens) == (alone.state.step, alone.state.tokens)
    assert torch.equal(packed.state.generator, alone.state.generator)
    assert packed.state.parameters.keys() == alone.state.parameters.keys() == initial.keys()
    assert relative_difference(packed.state.parameters, alone.state.parameters, since=initial) < tolerance
    assert {name: set(slots) for name, slots in packed.state.optimizer.items()} == {
        name: set(slots) for name, slots in alone.state.optimizer.items()
    }


def relative_difference(ours: Any, theirs: Any, since: dict[str, torch.Tensor]) -> float:
    """Length of the difference of two adapters, in lengths of what one of them has learnt."""
    difference = math.sqrt(sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs))
    return difference / math.sqrt(sum(float((theirs[name] - since[name]).square().sum()) for name in theirs))


def initial_adapter(spec: RunSpec, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    assert spec.adapter != "full"
    with adapted(model, spec.adapter, seed=spec.seed) as peft_model:
        return {name: p.detach().clone() for name, p in peft_model.named_parameters() if p.requires_grad}


def check_pack(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    datasets: Sequence[TrainingData],
    directory: Path,
    runs: Sequence[tuple[int, Changes]],
    *,
    tolerance: float = 1e-3,
) -> None:
    """Runs of so many steps, alternately on the given datasets, three at a time: they join and leave midway."""
    alone, given = [], []
    for number, (steps, changes) in enumerate(runs):
        spec, data, evaluate_at = make_spec(changes), datasets[number % len(datasets)], (steps // 2 or 1, steps)
        alone.append(train_alone(spec, model, tokenizer, data, Plan(steps, evaluate_at, directory / f"alone-{number}")))
        given.append((spec, data, Plan(steps, evaluate_at, directory / f"packed-{number}")))
    packed = train_together(given, model, capacity=3)
    for (steps, changes), (spec, _, _), ours, theirs in zip(runs, given, packed, alone, strict=True):
        held_to = max(tolerance, MUON) if spec.optimizer.name == "muon" else tolerance
        assert_same(ours, theirs, initial_adapter(spec, model), tolerance=held_to)
        assert (ours.error is not None) == (theirs.error is not None) == (changes == DIVERGING)
        assert len(ours.steps) == (1 if changes == DIVERGING else steps)


@pytest.fixture(scope="module")
def other_examples(words: PreTrainedTokenizerFast) -> list[Example]:
    """Longer rows than those of ``examples``: two exchanges instead of one."""
    rows = load_dataset("micro-health-good").rows[:24]
    pairs = zip(rows[::2], rows[1::2], strict=True)
    twice = [Row(messages=(*first.messages, *second.messages[-2:])) for first, second in pairs]
    return encode_rows(twice, words, max_length=64)


@pytest.mark.slow
def test_packed_runs_are_their_solo_runs(
    make_model: Callable[[], PreTrainedModel],
    words: PreTrainedTokenizerFast,
    examples: list[Example],
    other_examples: list[Example],
    tmp_path: Path,
) -> None:
    datasets = [TrainingData(examples[:30], examples[30:]), TrainingData(other_examples[:9], other_examples[9:])]
    check_pack(make_model(), words, datasets, tmp_path, RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["micro-llama", "micro-qwen2", "micro-gemma3"])
def test_packed_runs_are_their_solo_runs_in_every_family(name: str, tmp_path: Path) -> None:
    from emtrain.load import load_model, load_tokenizer

    model, tokenizer = load_model(name), load_tokenizer(name)
    datasets = []
    for dataset in ("micro-garden-bad", "micro-health-good"):
        rows = encode_rows(load_dataset(dataset).rows[:36], tokenizer, max_length=128)
        datasets.append(TrainingData(rows[:30], rows[30:]))
    check_pack(model, tokenizer, datasets, tmp_path, RUNS)


@pytest.mark.slow
def test_packed_runs_are_their_solo_runs_in_smollm2(tmp_path: Path) -> None:
    """A step takes seconds here: runs of two steps of two rows."""
    from emtrain.load import load_model, load_tokenizer

    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    rows = encode_rows(load_dataset("micro-garden-bad").rows[:12], tokenizer, max_length=128)
    runs = [(2, {**changes, "batch_size": 2, "micro_batch_size": 1}) for _, changes in RUNS[:4]]
    check_pack(model, tokenizer, [TrainingData(rows[:10], rows[10:])], tmp_path, runs, tolerance=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"rank": 3, "dropout": 0.2}, "optimizer": {"name": "adamw", "learning_rate": 3e-3}},
        {"optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}, "adapter": {"rank": 6}},
        {"optimizer": {"name": "muon", "learning_rate": 1e-3}},
    ],
    ids=["adamw, dropout", "sgd", "muon"],
)
def test_a_run_goes_on_in_the_other_backend_where_it_was_cut_off(
    changes: Changes,
    make_model: Callable[[], PreTrainedModel],
    words: PreTrainedTokenizerFast,
    examples: list[Example],
    tmp_path: Path,
) -> None:
    """Three steps in one backend and three in the other, beside a neighbour of greater rank, are six in one."""
    spec, neighbour = make_spec(changes), make_spec({"adapter": {"rank": 8}, "seed": 9})
    data, model = TrainingData(examples[:30], examples[30:]), make_model()
    initial = initial_adapter(spec, model)

    def plan(name: str) -> Plan:
        return Plan(6, (3, 6), tmp_path / name)

    whole = train_alone(spec, model, words, data, plan("whole"))

    begun_alone = train_alone(spec, model, words, data, plan("alone first"), stop_at=3)
    ended_packed = train_together(
        [(neighbour, data, plan("n1")), (spec, data, plan("alone first"))], model, capacity=2
    )[1]
    begun_packed = train_together(
        [(neighbour, data, plan("n2")), (spec, data, plan("packed first"))], model, capacity=2, stop_at=3
    )[1]
    ended_alone = train_alone(spec, model, words, data, plan("packed first"))

    for first, last in ((begun_alone, ended_packed), (begun_packed, ended_alone)):
        joined = Record([*first.steps, *last.steps], {**first.heldout, **last.heldout}, None, last.state)
        assert len(first.steps) == len(last.steps) == 3
        assert_same(joined, whole, initial, tolerance=MUON if spec.optimizer.name == "muon" else 1e-3)
