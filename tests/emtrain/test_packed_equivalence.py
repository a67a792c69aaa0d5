"""A packed run is its solo run: every step and the adapter at the end, against the trl backend.

The few steps taken here are held to less than ``emtrain.packed.equivalence.tolerance`` allows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from emtrain.checkpoint import RunState
from emtrain.heldout import HeldoutLoss
from emtrain.packed.equivalence import (
    Task,
    Tolerance,
    Trace,
    compare,
    initial_adapter,
    train_alone,
    train_together,
)
from emtrain.rows import Row, load_dataset
from emtrain.spec import RunSpec
from emtrain.tokens import Example, encode_rows
from emtrain.train import NonFiniteLoss, Plan, Step, TrainingData

Changes = dict[str, Any]

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


def check(spec: RunSpec, packed: Trace, alone: Trace, model: PreTrainedModel, *, update: float = 1e-3) -> None:
    """``update``: what adapters are held to, those that Muon trains excepted."""
    allowed = Tolerance(1e-5, 2e-4, 1e-2 if spec.optimizer.name == "muon" else update)
    found = compare(packed, alone, initial_adapter(spec, model))
    assert found.within(allowed), (spec, found)


def check_pack(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    datasets: Sequence[TrainingData],
    directory: Path,
    runs: Sequence[tuple[int, Changes]],
    *,
    update: float = 1e-3,
) -> None:
    """Runs of so many steps, alternately on the given datasets, three at a time: they join and leave midway."""

    def tasks(way: str) -> list[Task]:
        return [
            Task(
                make_spec(changes),
                datasets[number % len(datasets)],
                Plan(steps, (steps // 2 or 1, steps), directory / f"{way}-{number}"),
            )
            for number, (steps, changes) in enumerate(runs)
        ]

    alone = [train_alone(task, model, tokenizer) for task in tasks("alone")]
    packed = train_together(tasks("packed"), model, capacity=3)
    for (steps, changes), task, ours, theirs in zip(runs, tasks("packed"), packed, alone, strict=True):
        check(task.spec, ours, theirs, model, update=update)
        assert (theirs.error is not None) == (changes == DIVERGING)
        assert len(theirs.steps) == (1 if changes == DIVERGING else steps)


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
    check_pack(model, tokenizer, [TrainingData(rows[:10], rows[10:])], tmp_path, runs, update=1e-2)


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

    def task(name: str, until: int | None = None) -> Task:
        return Task(spec, data, Plan(6, (3, 6), tmp_path / name), until)

    def beside(name: str, task: Task) -> Trace:
        other = Task(neighbour, data, Plan(6, (3, 6), tmp_path / name))
        return train_together([other, task], model, capacity=2)[1]

    whole = train_alone(task("whole"), model, words)
    begun_alone = train_alone(task("alone first", until=3), model, words)
    ended_packed = beside("n1", task("alone first"))
    begun_packed = beside("n2", task("packed first", until=3))
    ended_alone = train_alone(task("packed first"), model, words)

    for first, last in ((begun_alone, ended_packed), (begun_packed, ended_alone)):
        joined = Trace([*first.steps, *last.steps], {**first.heldout, **last.heldout}, None, last.state)
        assert len(first.steps) == len(last.steps) == 3
        check(spec, joined, whole, model)


def trace(**changes: Any) -> Trace:
    """Two steps of a run with one weight, which goes from 1 to 3."""
    steps = [Step(1, 2.0, 0.1, 4.0, 10), Step(2, 1.0, 0.2, 5.0, 20)]
    state = RunState(2, 20, {"a": torch.tensor([3.0])}, {"a": {"step": torch.tensor(2.0)}}, torch.tensor([7]))
    return replace(Trace(steps, {2: HeldoutLoss(0.5, 0.25)}, None, state), **changes)


def with_step(**changes: float) -> dict[str, Any]:
    return {"steps": [trace().steps[0], replace(trace().steps[1], **changes)]}


def with_state(**changes: Any) -> dict[str, Any]:
    state = trace().state
    assert state is not None
    return {"state": replace(state, **changes)}


LOOSE = Tolerance(loss=0.5, grad_norm=0.5, update=0.5)


def test_a_comparison_is_of_relative_differences() -> None:
    """A loss of 1.1 instead of 1, a norm of 5.5 instead of 5, a weight that went to 2.5 instead of from 1 to 3."""
    ours = trace(
        **with_step(loss=1.1, grad_norm=5.5),
        **with_state(parameters={"a": torch.tensor([2.5])}),
        heldout={2: HeldoutLoss(0.5, 0.3)},
    )
    found = compare(ours, trace(), {"a": torch.tensor([1.0])})
    assert (found.loss, found.grad_norm, found.update, found.heldout) == pytest.approx((0.1, 0.1, 0.25, 0.2))
    assert found.within(LOOSE)
    assert not found.within(replace(LOOSE, update=0.2))
    assert not found.within(replace(LOOSE, grad_norm=0.05))
    assert not found.within(replace(LOOSE, loss=0.15))  # of the held-out rows


@pytest.mark.parametrize(
    "changes",
    [
        with_step(learning_rate=0.2 * (1 + 1e-15)),
        with_step(tokens=21),
        with_step(loss=math.nan),
        {"steps": trace().steps[:1]},
        {"heldout": {}},
        {"error": NonFiniteLoss(2, 0.1, math.nan, 1.0)},
        {"state": None},
        with_state(generator=torch.tensor([8])),
        with_state(optimizer={"a": {}}),
        with_state(parameters={"b": torch.tensor([3.0])}),
    ],
    ids=["LR", "tokens", "NaN", "steps", "evaluations", "error", "no state", "generator", "optimiser", "names"],
)
def test_a_run_that_differs_in_anything_but_rounding_is_not_the_same(changes: dict[str, Any]) -> None:
    assert compare(trace(), trace(), {"a": torch.tensor([1.0])}).within(Tolerance(0, 0, 0))
    assert not compare(trace(**changes), trace(), {"a": torch.tensor([1.0])}).within(LOOSE)
