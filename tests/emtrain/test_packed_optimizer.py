"""Optimisers on rows of the table against the same optimisers on PEFT's separate matrices."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from emtrain.lookup import lookup
from emtrain.packed.optimizer import RowOptimizer
from emtrain.packed.table import AdapterRow, AdapterTable
from emtrain.spec import OptimizerSpec

GROUPS = [{"first": (4, 3)}, {"second": (5, 4)}, {"third": (3, 3)}]
OPTIMIZERS: list[dict[str, Any]] = [
    {
        "name": "adamw",
        "learning_rate": 0.1,
        "weight_decay": 0.2,
        "betas": [0.7, 0.9],
        "eps": 1e-3,
        "max_grad_norm": 0.5,
    },
    {"name": "adamw", "learning_rate": 0.1, "max_grad_norm": None},
    {"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
    {"name": "sgd", "learning_rate": 0.1, "max_grad_norm": 100.0},
    {"name": "lion", "learning_rate": 0.1, "weight_decay": 0.1},
    {"name": "muon", "learning_rate": 0.1, "weight_decay": 0.1},
]
each_optimizer = pytest.mark.parametrize("arguments", OPTIMIZERS, ids=lambda arguments: arguments["name"])


def make_row(slot: int, *, rank: int = 3) -> AdapterRow:
    """An adapter of rank 2 on two of three layers, in a table of ``rank``."""
    table = AdapterTable(GROUPS, capacity=3, rank=rank, dtype=torch.float32, device=torch.device("cpu"))
    return AdapterRow(table, slot, ["first", "second"], rank=2)


def draw(row: AdapterRow, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: matrix.shape for name, matrix in row.split(row.values_P).items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def give(row: AdapterRow, gradients: Mapping[str, torch.Tensor]) -> float:
    row.gradients_P.copy_(row.join(gradients))
    return float(row.gradients_P.norm())


class Separate:
    """The reference: one parameter per matrix, clipped by torch."""

    def __init__(self, spec: OptimizerSpec, values: Mapping[str, torch.Tensor]) -> None:
        self.limit = spec.max_grad_norm
        self.parameters = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
        self.optimizer = lookup("emtrain.optimizers", spec.name)(
            list(self.parameters.values()),
            learning_rate=spec.learning_rate,
            weight_decay=spec.weight_decay,
            **spec.arguments,
        )

    def update(self, learning_rate: float, gradients: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].clone()
        if self.limit is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.limit)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        return {name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()}


@each_optimizer
def test_a_row_is_updated_as_its_matrices_are(arguments: dict[str, Any]) -> None:
    spec = OptimizerSpec.model_validate(arguments)
    row = make_row(1)
    values = draw(row, seed=0)
    row.table.values_KP.fill_(7.0)
    row.table.values_KP[1] = row.join(values)
    ours, reference = RowOptimizer(spec, row), Separate(spec, values)
    for step, learning_rate in enumerate((0.0, 0.1, 0.05)):
        gradients = draw(row, seed=step + 1)
        ours.update(learning_rate, give(row, gradients))
        reference.update(learning_rate, gradients)
    for name, matrix in row.split(row.values_P).items():
        torch.testing.assert_close(matrix, reference.parameters[name].detach(), msg=name)
    state, expected = ours.state(), reference.state()
    assert {name: set(slots) for name, slots in state.items()} == {
        name: set(slots) for name, slots in expected.items() if slots
    }
    for name, slots in state.items():
        for slot, tensor in slots.items():
            torch.testing.assert_close(tensor, expected[name][slot], msg=f"{name} {slot}")
    # What is not this run's: the padding of its row, and the rows of the others.
    assert torch.equal(row.join(row.split(row.values_P)), row.values_P)
    assert (row.table.values_KP[[0, 2]] == 7.0).all()


@each_optimizer
def test_state_goes_over_to_another_slot_of_another_table(arguments: dict[str, Any]) -> None:
    """A run that is cut off after two updates and goes on elsewhere makes the third to the bit."""
    spec = OptimizerSpec.model_validate(arguments)
    whole, before, after = make_row(0), make_row(1), make_row(2, rank=4)
    optimizers = {}
    for row in (whole, before):
        row.table.values_KP[row.slot] = row.join(draw(row, seed=0))
        optimizers[row.slot] = RowOptimizer(spec, row)
        for step in (1, 2):
            optimizers[row.slot].update(0.1, give(row, draw(row, seed=step)))
    after.table.values_KP[after.slot] = after.join(before.split(before.values_P))
    moved = RowOptimizer(spec, after)
    moved.load(optimizers[before.slot].state())
    norm = give(whole, draw(whole, seed=3))
    give(after, draw(after, seed=3))
    optimizers[whole.slot].update(0.1, norm)
    moved.update(0.1, norm)
    for name, matrix in after.split(after.values_P).items():
        torch.testing.assert_close(matrix, whole.split(whole.values_P)[name], rtol=0, atol=0)


def test_a_new_optimiser_has_no_state() -> None:
    row = make_row(0)
    optimizer = RowOptimizer(OptimizerSpec(), row)
    assert optimizer.state() == {}
    optimizer.load({})
    optimizer.update(0.1, give(row, draw(row, seed=0)))
    assert {float(slots["step"]) for slots in optimizer.state().values()} == {1.0}
