"""One of the runs of an engine: which rows it takes next, and its update."""

import math
from collections.abc import Sequence

import torch

from emtrain.checkpoint import RunState
from emtrain.order import row_order
from emtrain.packed.batch import Dropout, Unit
from emtrain.packed.optimizer import RowOptimizer
from emtrain.packed.table import AdapterRow, AdapterTable, initial_matrices
from emtrain.schedule import build
from emtrain.seeds import derive
from emtrain.spec import AdapterSpec, RunSpec
from emtrain.train import NonFiniteLoss, Step, TrainingData


class Run:
    """A run between two steps, as ``Engine.join`` makes it. ``step`` and ``tokens`` are those done so far."""

    def __init__(
        self, spec: RunSpec, adapter: AdapterSpec, data: TrainingData, total_steps: int, layers: Sequence[str]
    ) -> None:
        self.spec, self.adapter, self.data, self.total_steps, self.layers = spec, adapter, data, total_steps, layers
        self.step = self.tokens = 0
        self._schedule = build(spec.schedule, total_steps)
        self._order = row_order(len(data.train), batch_size=spec.batch_size, total_steps=total_steps, seed=spec.seed)

    @property
    def slot(self) -> int:
        """Its row of the table."""
        return self.row.slot

    @property
    def learning_rate(self) -> float:
        """Of the last update."""
        return self.spec.optimizer.learning_rate * self._schedule(self.step - 1)

    def enter(self, table: AdapterTable, slot: int, dtype: torch.dtype, state: RunState | None) -> None:
        """Take a row of the table, as ``state`` has it or with the new adapter that the seed gives."""
        row = AdapterRow(table, slot, self.layers, self.adapter.rank)
        optimizer = RowOptimizer(self.spec.optimizer, row)
        generator = torch.Generator(row.values_P.device)
        if state is None:
            shapes = {name: matrix.shape for name, matrix in row.split(row.values_P).items()}
            matrices = initial_matrices(shapes, dtype, seed=self.spec.seed)
            generator.manual_seed(derive(self.spec.seed, "dropout"))
        else:
            matrices = dict(state.parameters)
            self.step, self.tokens = state.step, state.tokens
            optimizer.load(state.optimizer)
            generator.set_state(state.generator)
        rank = self.adapter.rank
        scale = self.adapter.alpha / (math.sqrt(rank) if self.adapter.rslora else rank)
        table.fill(slot, row.join(matrices), scale)
        # Last, so that a run that moves to another table is still in the old one when there is no memory for the new.
        self.row, self.optimizer, self.generator = row, optimizer, generator

    def state(self) -> RunState:
        """A snapshot of all that the next step needs."""
        return RunState(
            self.step,
            self.tokens,
            {name: matrix.clone() for name, matrix in self.row.split(self.row.values_P).items()},
            self.optimizer.state(),
            self.generator.get_state(),
        )

    def next_units(self, *, most_rows: int, most_tokens: int) -> list[Unit]:
        """The rows of the next step, in units of at most so many rows and, padding included, tokens; at least one row.

        With dropout the units are the micro-batches of the specification, because the draws follow their shapes.
        Without dropout any division gives the same gradient, and rows of like length share a unit.
        """
        rows = [self.data.train[number] for number in self._order[self.step]]
        if self.adapter.dropout:
            dropout = Dropout(self.adapter.dropout, self.generator, self.layers)
            size = self.spec.micro_rows
        else:
            dropout = None
            rows.sort(key=lambda row: len(row.input_ids), reverse=True)
            size = min(most_rows, max(1, most_tokens // len(rows[0].input_ids)))
        return [Unit(self.slot, rows[start : start + size], dropout) for start in range(0, len(rows), size)]

    def update(self, loss: float, gradient_norm: float, tokens: int) -> Step | NonFiniteLoss:
        """Make the update of the step whose gradient is in the row, unless loss or gradient is not finite."""
        learning_rate = self.spec.optimizer.learning_rate * self._schedule(self.step)
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return NonFiniteLoss(self.step + 1, learning_rate, loss, gradient_norm)
        self.optimizer.update(learning_rate, gradient_norm)
        self.step += 1
        self.tokens += tokens
        return Step(self.step, loss, learning_rate, gradient_norm, self.tokens)
