"""From the rows of many runs to the tensors of one forward pass.

A *unit* is one micro-batch of one run. A *pass* holds units of different runs, all padded to the frame of the largest,
B rows of T tokens::

                 T tokens
    unit 0   [ w w w w . . ]     run in slot 0
    (B rows) [ w w w w w w ]
    unit 1   [ w w w . . . ]     run in slot 3; its second row is padding
             [ . . . . . . ]

Rows are padded on the right, and attention is causal, so no token ever attends to padding and no mask is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from emtrain.tokens import IGNORED, Example

# Shapes: U units, B rows of a unit, T tokens of a row, n positions that logits are needed at.


@dataclass(frozen=True)
class Frame:
    """What units are padded to."""

    rows: int
    tokens: int

    @property
    def size(self) -> int:
        """Tokens, padding included."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class Dropout:
    """How a run drops inputs of its adapter."""

    probability: float
    generator: torch.Generator
    layers: Sequence[str]
    """The layers that the run adapts; no other draws."""


class Unit:
    """One micro-batch of the run in ``slot``. ``frame`` is that of the unit by itself."""

    def __init__(self, slot: int, examples: Sequence[Example], dropout: Dropout | None = None) -> None:
        self.slot, self.examples, self.dropout = slot, examples, dropout
        lengths = [len(example.input_ids) for example in examples]
        self.frame = Frame(len(examples), max(lengths))
        self.tokens = sum(lengths)
        self.response_tokens = sum(example.response_tokens for example in examples)


@dataclass(frozen=True)
class Pass:
    """The tensors of one forward pass. Units are in the order of their slots."""

    index: slice | torch.Tensor
    """The units' slots, as an index into the table."""
    dropouts: Sequence[tuple[int, Frame, Dropout]]
    """Place, frame and dropout of the units that have dropout."""
    input_ids: torch.Tensor
    """``(U * B, T)``."""
    positions_n: torch.Tensor
    """Positions in the flattened tokens that logits are needed at, unit by unit."""
    targets_n: torch.Tensor
    """The token that follows each position."""
    weights_n: torch.Tensor
    """Weight of each position's loss in the loss of its run; 0 where nothing is learnt."""
    positions_U: torch.Tensor
    """How many positions each unit has."""


def group(units: Sequence[Unit], *, overhead: int, limit: int) -> list[list[Unit]]:
    """Units that share a pass: all of them, unless padding them to one frame costs more than another pass does.

    ``overhead`` is what a pass costs whatever its size, in tokens that could be computed in that time; ``limit`` is
    the most tokens, padding included, of a pass (a unit beyond it goes alone).
    """
    groups: list[list[Unit]] = []
    for unit in sorted(units, key=lambda unit: (unit.frame.rows, unit.frame.tokens, unit.slot), reverse=True):
        if groups:
            joined = [*groups[-1], unit]
            padded = len(joined) * _common(joined).size
            if padded <= limit and padded - sum(member.frame.size for member in joined) <= overhead:
                groups[-1] = joined
                continue
        groups.append([unit])
    return groups


def assemble(
    units: Sequence[Unit],
    weights: Mapping[int, float],
    *,
    device: torch.device,
    fixed: tuple[int, Frame] | None = None,
) -> Pass:
    """Pad ``units`` of different runs to one frame.

    ``weights`` by slot: 1 / response tokens of the run's whole step. ``fixed`` is a capacity and a frame: then every
    slot has a unit, of padding where none is given, and logits are asked for at every position, so that no shape
    depends on the units.
    """
    slots = list(range(fixed[0])) if fixed else sorted(unit.slot for unit in units)
    frame = fixed[1] if fixed else _common(units)
    input_ids_UBT = np.zeros((len(slots), frame.rows, frame.tokens), dtype=np.int64)
    targets_UBT = np.full_like(input_ids_UBT, IGNORED)
    weights_U11 = np.zeros((len(slots), 1, 1))
    for unit in units:
        place = slots.index(unit.slot)
        weights_U11[place] = weights[unit.slot]
        for row, example in enumerate(unit.examples):
            length = len(example.input_ids)
            input_ids_UBT[place, row, :length] = example.input_ids
            targets_UBT[place, row, : length - 1] = example.labels[1:]
    learnt_UBT = targets_UBT != IGNORED
    needed_UBT = np.ones_like(learnt_UBT) if fixed else learnt_UBT

    def tensor(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Pass(
        index=index_of(slots, device),
        dropouts=[(slots.index(unit.slot), unit.frame, unit.dropout) for unit in units if unit.dropout],
        input_ids=tensor(input_ids_UBT.reshape(-1, frame.tokens)),
        positions_n=tensor(np.flatnonzero(needed_UBT)),
        targets_n=tensor(np.where(learnt_UBT, targets_UBT, 0)[needed_UBT]),
        weights_n=tensor((weights_U11 * learnt_UBT)[needed_UBT]),
        positions_U=tensor(needed_UBT.sum(axis=(1, 2))),
    )


def index_of(slots: Sequence[int], device: torch.device) -> slice | torch.Tensor:
    """Slots as an index into the table: a slice where they follow each other, so that nothing is copied."""
    first = slots[0]
    if list(slots) == list(range(first, first + len(slots))):
        return slice(first, first + len(slots))
    return torch.tensor(slots, device=device)


def _common(units: Sequence[Unit]) -> Frame:
    return Frame(max(unit.frame.rows for unit in units), max(unit.frame.tokens for unit in units))
